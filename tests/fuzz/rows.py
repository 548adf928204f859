"""Good rows of every form that the data readers take, to be damaged."""

from __future__ import annotations

from typing import Any

_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
_TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]
_CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]

IDS: dict[str, Any] = {
    "input_ids": [5, 6, 7, 8, 9, 10],
    "loss_mask": [0, 0, 1, 1, 1, 1],
    "behavior_logprobs": [None, None, -0.1, -0.2, -0.3, -0.4],
}
TOP: dict[str, Any] = {
    "behavior_topk_ids": [None, [], [7, 1], [8], [9, 2], [10]],
    "behavior_topk_logprobs": [None, [], [-0.1, -3.0], [-0.2], [-0.3, -4.5], [-0.4]],
}
WITH_IDS: list[dict[str, Any]] = [
    IDS,
    {**IDS, "reward": -1.0, "id": "a", "temperature": 1.0, "truncated": False, "metadata": {"x": [1]}},
    {**IDS, "token_weights": [0, 0, 1.5, -2.0, 0, 1], "tokenizer_hash": "cafe"},
    {**IDS, **TOP},
    {**IDS, **TOP, "reference_logprobs": [None, None, -0.2, -0.1, -0.5, -0.4], "policy_logprobs": [0.0] * 6},
]
OF_TEXT: list[dict[str, Any]] = [
    {"prompt": "2+2=", "response": "4"},
    {"prompt": "2+2=", "response": "4", "truncated": True, "reward": -1, "id": 7},
    {"prompt": _CHAT[:1], "response": "4"},
    {"messages": _CHAT},
    {"messages": [{"role": "system", "content": "Be brief."}, *_CHAT, *_CHAT]},
    {"messages": [_CHAT[0], {**_CHAT[1], "weight": 0}, _CHAT[0], {**_CHAT[1], "weight": 1}]},
    {"messages": [_CHAT[0], {"role": "assistant", "reasoning_content": "easy", "content": "4"}]},
    {"messages": [_CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]},
    {
        "messages": [
            _CHAT[0],
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "add", "content": "4"},
            _CHAT[1],
        ],
        "tools": _TOOLS,
        "documents": [{"title": "t", "text": "x"}],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
]  # fmt: skip
