"""The chunks of a streamed chat or completion, joined to the answer that the server would have given at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import short

_COMPLETION = "text_completion"
_TEXTS = ("content", "reasoning_content", "reasoning")


def is_chunk(body: Any) -> bool:
    """Whether it is a chunk of a streamed chat."""
    if not isinstance(body, Mapping):
        return False
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return body.get("object") == "chat.completion.chunk" or (isinstance(first, Mapping) and "delta" in first)


def are_chunks(answers: Sequence[Any]) -> bool:
    """Whether one of them is a chunk of a chat, or all are completions with one id, as several answers are not."""
    if any(is_chunk(one) for one in answers):
        return True
    kinds = {(one.get("object"), one.get("id")) if isinstance(one, Mapping) else None for one in answers}
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind is not None and kind[0] == _COMPLETION and kind[1] is not None


def joined(chunks: Sequence[Any]) -> dict[str, Any]:
    """The answer; RowProblem where one of them is no chunk."""
    body: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    chat = any(is_chunk(chunk) for chunk in chunks)
    for k, chunk in enumerate(chunks):
        if chat and not is_chunk(chunk):
            raise RowProblem(
                f"response[{k}] = {short(chunk)} is no chunk of the stream; write them as they came"
            )
        body |= {name: value for name, value in chunk.items() if value is not None and name != "choices"}
        for part in chunk.get("choices") or []:
            choice = choices.setdefault(part.get("index", 0), {})
            if chat:
                _add_message(choice.setdefault("message", {"role": "assistant"}), part.get("delta") or {})
            _add(choice, part)
    kind = "chat.completion" if chat else _COMPLETION
    return {**body, "object": kind, "choices": [choices[index] for index in sorted(choices)]}


def _add_message(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for name in _TEXTS:
        if delta.get(name) is not None:
            message[name] = message.get(name, "") + delta[name]
    for call in delta.get("tool_calls") or []:
        calls = message.setdefault("tool_calls", [])
        if call.get("index", len(calls)) >= len(calls):
            calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        function = calls[call.get("index", -1)]["function"]
        for name, value in (call.get("function") or {}).items():
            function[name] = function.get(name, "") + (value or "")


def _add(choice: dict[str, Any], part: Mapping[str, Any]) -> None:
    for name, entries in (part.get("logprobs") or {}).items():
        if entries:
            choice.setdefault("logprobs", {}).setdefault(name, []).extend(entries)
    if part.get("text") is not None:
        choice["text"] = choice.get("text", "") + part["text"]
    if part.get("token_ids"):
        choice.setdefault("token_ids", []).extend(part["token_ids"])
    others = ("finish_reason", "stop_reason", "matched_stop", "prompt_token_ids")
    choice |= {name: part[name] for name in others if part.get(name) is not None}
