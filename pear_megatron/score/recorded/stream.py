"""The chunks of a streamed chat, joined to the answer that the server would have given at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import short

_TEXTS = ("content", "reasoning_content", "reasoning")


def is_chunk(body: Any) -> bool:
    """Whether it is a chunk of a streamed chat."""
    if not isinstance(body, Mapping):
        return False
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return body.get("object") == "chat.completion.chunk" or (isinstance(first, Mapping) and "delta" in first)


def joined(chunks: Sequence[Any]) -> dict[str, Any]:
    """The answer; RowProblem where one of them is no chunk."""
    body: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for k, chunk in enumerate(chunks):
        if not is_chunk(chunk):
            raise RowProblem(
                f"response[{k}] = {short(chunk)} is no chunk of the stream; write them as they came"
            )
        body |= {name: value for name, value in chunk.items() if value is not None and name != "choices"}
        for part in chunk.get("choices") or []:
            choice = choices.setdefault(part.get("index", 0), {"message": {"role": "assistant"}})
            _add(choice, part)
    return {**body, "object": "chat.completion", "choices": [choices[index] for index in sorted(choices)]}


def _add(choice: dict[str, Any], part: Mapping[str, Any]) -> None:
    message, delta = choice["message"], part.get("delta") or {}
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
    content = (part.get("logprobs") or {}).get("content")
    if content:
        choice.setdefault("logprobs", {"content": []})["content"].extend(content)
    if part.get("token_ids"):
        choice.setdefault("token_ids", []).extend(part["token_ids"])
    others = ("finish_reason", "stop_reason", "matched_stop", "prompt_token_ids")
    choice |= {name: part[name] for name in others if part.get(name) is not None}
