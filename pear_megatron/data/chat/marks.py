"""{% generation %} marks: used where a template has them, and checked."""

from __future__ import annotations

import re

from pear_megatron.data.chat.fit import Fitter
from pear_megatron.data.chat.messages import Message
from pear_megatron.data.chat.template import Setting
from pear_megatron.data.chat.turns import TurnWriter
from pear_megatron.data.errors import RowProblem

_EMPTY_BLOCK = re.compile(r"\s*<think>\s*</think>")


def check_marks(fitter: Fitter, messages: list[Message], setting: Setting) -> None:
    """RowProblem where the template marks another role's text as generated, or leaves the assistant's unmarked."""
    for name, inside, assistant in fitter.marked(messages, setting):
        if inside != assistant:
            what = "leaves it out of" if assistant else "has it in"
            raise RowProblem(
                f"{name}: the chat template {what} its {{% generation %}} marks; mend the template, or use one "
                "without marks"
            )


def marked_contexts(text: str, turns: list[tuple[str, str]], writer: TurnWriter) -> list[str] | None:
    """The text before each turn, where it is the turn's context and, at most, an empty think block.

    Such a block is what the generation prompt supplies when thinking is switched off. None where the text holds
    something else than a turn's context before it, or not the turn as it was written behind it.

    Args:
        turns: (context, what the policy wrote) of each.
    """
    found = []
    for context, turn in turns:
        body = turn[: len(turn) - writer.length_of_end(turn)]
        if not text.startswith(context):
            return None
        starts = [len(context)]
        if block := _EMPTY_BLOCK.match(text, len(context)):
            space = re.compile(r"\s*").match(text, block.end())
            assert space is not None
            starts += range(block.end(), space.end() + 1)
        start = next((start for start in starts if text.startswith(body, start)), None)
        if start is None:
            return None
        found.append(text[:start])
    return found
