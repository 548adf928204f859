"""The dialects in which conversations come."""

from __future__ import annotations

from typing import Any

import pytest

from pear_megatron.data.chat.messages import check_order, read_messages
from pear_megatron.data.errors import RowProblem

USER = {"role": "user", "content": "Hi", "weight": 1}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def test_sharegpt_is_read_as_what_it_is() -> None:
    rows = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two.", "weight": 0},
    ]
    assert read_messages(rows) == [
        {"role": "system", "content": "Be brief.", "weight": 1},
        USER,
        {"role": "assistant", "content": "", "weight": 1, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "weight": 1},
        {"role": "assistant", "content": "Two.", "weight": 0},
    ]


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}', {"x": 1, "of_another_row": None}])
@pytest.mark.parametrize("envelope", [True, False])
def test_call_is_read_with_and_without_its_envelope(arguments: Any, envelope: bool) -> None:
    function = {"name": "f", "arguments": arguments}
    call = {"id": None, "type": "function", "function": function} if envelope else function
    (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [call], "name": None}])
    assert message == {"role": "assistant", "content": "", "weight": 1, "tool_calls": [CALL]}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_one_field(name: str) -> None:
    (message,) = read_messages([{"role": "assistant", "content": "4", name: "add"}])
    assert message["reasoning_content"] == "add"


BAD = {
    "old form of a call": (
        {"role": "assistant", "content": "4", "function_call": {"name": "f", "arguments": "{}"}},
        r"messages\[0\]\.function_call = .* would be left out; write it as tool_calls",
    ),
    "refusal": (
        {"role": "assistant", "content": None, "refusal": "No."},
        r"messages\[0\]\.refusal = 'No\.' would be left out; the policy's words go into the content",
    ),
    "thinking twice": (
        {"role": "assistant", "content": "<think>add</think>4", "reasoning_content": "add"},
        "both in its content, as <think>, and beside it; keep one",
    ),
    "unknown sender": (
        {"from": "narrator", "value": "x"},
        r"messages\[0\]\.from = 'narrator'; it is one of human",
    ),
    "call that is no JSON": ({"from": "function_call", "value": "f(1)"}, "a function_call is JSON"),
    "weight": ({"role": "assistant", "content": "4", "weight": 0.5}, r"weight = 0\.5; .* token_weights"),
    "number": ({"role": "user", "content": 4}, r"messages\[0\]\.content = 4 is a int"),
    "image": (
        {"role": "user", "content": [{"type": "image"}]},
        r"messages\[0\]\.content\[0\] = .* no text part",
    ),
    "call without a name": (
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
        "must be {type, fun",
    ),
    "arguments": (
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": [1]}]},
        r"arguments = \[1\]; give an object",
    ),
    "two thoughts": (
        {"role": "assistant", "content": "", "reasoning": "a", "thinking": "b"},
        "different texts",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_message_is_named(kind: str) -> None:
    message, expected = BAD[kind]
    with pytest.raises(RowProblem, match=expected):
        read_messages([message])


def test_weight_zero_on_every_turn_leaves_no_decision() -> None:
    messages = read_messages([USER, {"role": "assistant", "content": "4", "weight": 0}])
    with pytest.raises(RowProblem, match="weight is 0 on every assistant turn"):
        check_order(messages)
