"""The tokens with which a policy ends a turn, found out from the chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pear_megatron.data.chat.fit import Fitter
from pear_megatron.data.chat.messages import Message
from pear_megatron.data.chat.template import Setting, Template
from pear_megatron.data.errors import RowProblem

_USER: Message = {"role": "user", "content": "Zquserx"}
_LATER: Message = {"role": "user", "content": "Zqlaterx"}
_ANSWER: Message = {"role": "assistant", "content": "Zqlastx"}
_CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "Zqnamex", "arguments": {"key": "Zqlastx"}},
}
_CALLING: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT: Message = {"role": "tool", "name": "Zqnamex", "tool_call_id": "call00001", "content": "Zqlaterx"}


@dataclass(frozen=True)
class End:
    """What ends a turn.

    Attributes:
        text: as it is appended, such as ``<|im_end|>`` or ``<|END_RESPONSE|><|END_OF_TURN_TOKEN|>``.
        stop: the last token of it, at which sampling stops.
        found: whether the template writes it, else it is the tokenizer's EOS.
    """

    text: str
    stop: str
    found: bool = True


def find_end(fitter: Fitter, special: Iterable[str], eos: str | None, *, calls: bool) -> End:
    """The end of a turn of text, or of one with tool calls.

    The special tokens behind the last turn of a conversation, where the template puts the same there before the
    next message; else those behind the last turn (gpt-oss); else those at the head of the next message (GLM); else
    the tokenizer's EOS.

    Raises:
        RowProblem: there are none, and the tokenizer has no EOS.
    """
    turn, later = (_CALLING, _RESULT) if calls else (_ANSWER, _LATER)
    # Not </tool_call>.
    special = [token for token in special if token == eos or not re.fullmatch(r"</\w+>", token)]
    for text, which in _candidates(fitter, turn, later):
        runs = _runs(text, special)
        if runs:
            return End("".join(runs[which]), runs[which][-1])
    if eos is None:
        raise RowProblem(
            "the chat template ends no turn with a special token, and the tokenizer has no EOS; set one"
        )
    return End(eos, eos, found=False)


def end_of_turn(tokenizer: Any) -> int | None:
    """Id of the special token that ends an answer; None without a chat template.

    Base models' tokenizers have ``<|endoftext|>`` as EOS while their chat template ends a turn with ``<|im_end|>``:
    whoever stops at the EOS alone lets a model that was trained on chats write on.

    Raises:
        RowProblem: the chat template cannot be read, or it ends no turn and the tokenizer has no EOS.
    """
    if not tokenizer.chat_template:
        return None
    fitter = Fitter(Template(tokenizer, str(tokenizer.get_chat_template())))
    stop = find_end(fitter, special_texts(tokenizer), tokenizer.eos_token, calls=False).stop
    return int(tokenizer.convert_tokens_to_ids(stop))


def _candidates(fitter: Fitter, turn: Message, later: Message) -> list[tuple[str, int]]:
    last = _tail(fitter, [_USER, turn])
    following = _tail(fitter, [_USER, turn, later]).partition("Zqlaterx")[0]
    return [(common_prefix(last, following), -1), (last, 0), (following, 0)]


def common_prefix(a: str, b: str) -> str:
    """The text that both begin with."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _tail(fitter: Fitter, messages: list[Message]) -> str:
    try:
        return fitter.render(messages, Setting()).rpartition("Zqlastx")[2]
    except RowProblem:
        return ""


def _runs(text: str, special: list[str]) -> list[list[str]]:
    """The special tokens in the text, those without anything between them together."""
    runs: list[list[str]] = []
    end = -1
    for match in re.finditer(
        "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)", text
    ):
        if match.start() != end:
            runs.append([])
        runs[-1].append(match.group())
        end = match.end()
    return runs


def special_texts(tokenizer: Any) -> list[str]:
    """The special tokens as they are written."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
