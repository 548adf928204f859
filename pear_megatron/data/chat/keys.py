"""Keys of a message that are not read: those that say something are refused, the others are counted."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import short

REASONING = ("reasoning_content", "reasoning", "thinking")
_READ = ("role", "content", "from", "value", "weight", "tool_calls", "name", "tool_call_id", *REASONING)
# What other programs call the choice of the turns that are trained.
_LEFT_OUT = ("masked", "is_masked", "ignore", "ignored", "exclude")
_TRAINED = (
    "train",
    "trainable",
    "training",
    "trained",
    "is_trainable",
    "should_train",
    "train_on_turn",
    "train_detail",
)
_CHOICES = (*_TRAINED, "loss", "loss_mask", "loss_weight", "loss_scale", "mask", *_LEFT_OUT)
_ENDS = ("finish_reason", "stop_reason", "done_reason")
_CUT_OFF = ("length", "max_tokens", "max_output_tokens", "content_filter")
_THINKING = ("reasoning_details", "reasoning_text", "thinking_blocks", "thoughts", "thought")
_CHECKED = {*_READ, *_CHOICES, *_THINKING, "reward"}
_NO_MISSPELLING = ("context",)
_ARGUMENTS = ("arguments", "parameters", "args", "input", "params", "kwargs")


def check_keys(message: Mapping[str, Any], where: str, body: str) -> None:
    """Refuses keys that choose what is trained, thinking under a foreign name, and misspelt keys.

    Args:
        message: with its role, and without the keys whose value is null.
        where: its place in the row.
        body: the key that the text stands under, ``content`` or ShareGPT's ``value``.
    """
    assistant = message["role"] == "assistant"
    for key, value in message.items():
        if key in _READ or _is_empty(value):
            continue
        found = f"{where}.{key} = {short(value)} would not be read"
        if key in _CHOICES and not _is_done_anyway(key, value, assistant):
            either = ", and programs differ in what it means" if key == "mask" else ""
            raise RowProblem(
                f'{found}{either}; "weight": 0 in an assistant\'s message keeps its turn out of training, every other '
                "assistant turn is trained, and nothing else"
            )
        if assistant and key in _ENDS and value in _CUT_OFF and message.get("weight") != 0:
            raise RowProblem(
                f"{where}.{key} = {short(value)}: the turn was cut off and would be trained to end there; take the key "
                'out, and write "truncated": true on the row if the turn is its last, or "weight": 0 in the message'
            )
        if key == "reward" and (assistant or value):
            raise RowProblem(
                f"{found}; a reward is of a whole row: write it there, or give each turn as a row"
            )
        if key in _THINKING and _is_lost_thinking(message, value):
            raise RowProblem(
                f"{found}; write thinking as a text into 'reasoning_content', or drop the row if it is hidden"
            )
        if key not in _CHECKED and (meant := _meant(key, body)) and _fits(meant, value, assistant):
            same = message.get("content" if meant == body else meant)
            if not _thinks(message) if meant in REASONING else _is_empty(same):
                raise RowProblem(f"{found}; did you mean {meant!r}?")


def unread_keys(message: Mapping[str, Any], template: str) -> Iterator[str]:
    """The keys that neither this package nor a chat template with this text reads."""
    return (
        key
        for key, value in message.items()
        if key not in _CHECKED and key not in template and not _is_empty(value)
    )


def check_call(call: Mapping[str, Any], function: Mapping[str, Any], where: str) -> None:
    """RowProblem where arguments of a call stand under another key than ``function.arguments``."""
    if function.get("arguments") is not None:
        return
    for place, keys in ((where, call), (f"{where}.function", function)):
        for key, value in keys.items():
            if isinstance(value, Mapping) and value.get("type") == "object" and "properties" in value:
                continue  # the schema of the function, not a call's arguments
            near = key in _ARGUMENTS or difflib.get_close_matches(key.lower(), ["arguments"], cutoff=0.85)
            if near and not _is_empty(value):
                raise RowProblem(
                    f"{place}.{key} = {short(value)} would not be read; the arguments of a call go into "
                    "function.arguments"
                )


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _is_lost_thinking(message: Mapping[str, Any], value: Any) -> bool:
    """Of a key that holds thinking: whether a turn that is learned from would lose it."""
    learned = message["role"] == "assistant" and message.get("weight") != 0
    return learned and isinstance(value, (str, list, dict)) and not _thinks(message)


def _fits(meant: str, value: Any, assistant: bool) -> bool:
    """Whether a value can be what the key that was meant holds, in a message of this role."""
    if meant == "weight":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if meant == "tool_calls":
        return assistant and isinstance(value, (list, dict))
    return isinstance(value, (str, list)) and (assistant or meant not in REASONING)


def _is_done_anyway(key: str, value: Any, assistant: bool) -> bool:
    """Whether a choice is what happens without it; an assistant's ``mask`` means either, as programs differ."""
    if (
        not assistant
        and key not in _LEFT_OUT
        and (value == 0 or (isinstance(value, list) and not any(value)))
    ):
        return True
    trained = not assistant if key in _LEFT_OUT else assistant
    return key != "mask" and isinstance(value, (int, float)) and value == trained


def _thinks(message: Mapping[str, Any]) -> bool:
    return "</think>" in str(message.get("content")) or any(message.get(key) for key in REASONING)


@lru_cache(1024)
def _meant(key: str, body: str) -> str | None:
    """The key that this one is a misspelling of, if it looks like one."""
    known = (body, "weight", "tool_calls", *REASONING)
    lower = key.lower()
    if re.search(r"^(is|has)_|_(ids?|ms|seconds|count|tokens)$", lower):
        return None  # something about it
    swapped = [name for name in known if sorted(name) == sorted(lower)]
    near = swapped or difflib.get_close_matches(lower, known, n=1, cutoff=0.85)
    return near[0] if near and key not in _NO_MISSPELLING else None
