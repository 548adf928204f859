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


def test_what_other_programs_write_as_texts_and_calls_is_read() -> None:
    rows = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"from": "function_call", "value": '<think>add</think>\n{"name": "f", "arguments": {"x": 1}}'},
        {"from": "function_call", "value": {"name": "f", "arguments": {"x": 1}}},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "chatgpt", "value": "Two."},
    ]
    asked, thought, called, called_once, said = read_messages(rows)
    assert asked == USER
    assert thought["content"] == "<think>add</think>"
    assert thought["tool_calls"] == called["tool_calls"] == called_once["tool_calls"] == [CALL]
    assert said["role"] == "assistant"


@pytest.mark.parametrize("key", ["text", "parts", "message"])
def test_content_under_another_name_is_refused(key: str) -> None:
    with pytest.raises(
        RowProblem, match=rf"messages\[0\]\.{key} = .* would not be read; write it as 'content'"
    ):
        read_messages([{"role": "assistant", "content": None, key: "Hello"}])
    (message,) = read_messages([{"role": "assistant", "content": "Hello", key: "Hello"}])
    assert message["content"] == "Hello"


def test_thinking_of_others_than_the_assistant_is_refused() -> None:
    with pytest.raises(RowProblem, match=r"messages\[0\] has thinking and is no assistant's"):
        read_messages([USER | {"reasoning_content": "hm"}])
    assert read_messages([USER | {"reasoning_content": ""}]) == [USER]


def test_messages_that_are_json_texts_are_refused_with_the_remedy() -> None:
    with pytest.raises(RowProblem, match="messages is a list of JSON texts; parse each"):
        read_messages(['{"role": "user", "content": "Hi"}'])


@pytest.mark.parametrize("arguments", ["", " ", None, {}])
def test_a_function_without_parameters_is_called_with_none(arguments: Any) -> None:
    (message,) = read_messages([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {}


def test_a_greeting_without_a_prompt_may_stand_as_context() -> None:
    greeting = {"role": "assistant", "content": "Welcome!"}
    rows = [greeting, USER, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(RowProblem, match='or give it "weight": 0'):
        check_order(read_messages(rows))
    check_order(read_messages([greeting | {"weight": 0}, *rows[1:]]))


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("envelope", [True, False])
def test_call_is_read_with_and_without_its_envelope(arguments: Any, envelope: bool) -> None:
    function = {"name": "f", "arguments": arguments}
    call = {"id": None, "type": "function", "function": function} if envelope else function
    (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [call], "name": None}])
    assert message == {"role": "assistant", "content": "", "weight": 1, "tool_calls": [CALL]}


@pytest.mark.parametrize("arguments", [{"x": None, "y": [{"z": None}]}, '{"x": null, "y": [{"z": null}]}'])
def test_nulls_among_arguments_stay(arguments: Any) -> None:
    (message,) = read_messages(
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments, "id": None}]}]
    )
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"x": None, "y": [{"z": None}]}}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_one_field(name: str) -> None:
    (message,) = read_messages([{"role": "assistant", "content": "4", name: "add"}])
    assert message["reasoning_content"] == "add"


BAD = {
    "old form of a call": (
        {
            "role": "assistant",
            "function_call": {"name": "f"},
            "tool_calls": [{"name": "f", "arguments": "{}"}],
        },
        r"messages\[0\]\.function_call = .* would be left out; write one list of tool_calls",
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
    "sender that is an object": (
        {"from": {"role": "gpt"}, "value": "r"},
        r"from = \{'role': 'gpt'\}; it is one of",
    ),
    "ShareGPT's text under content": ({"from": "gpt", "content": "r"}, r"content = 'r' .*; write 'value'"),
    "a role that templates do not know": (
        {"role": "model", "content": "4"},
        "role = 'model'; write 'assistant'",
    ),
    "a role in capitals": ({"role": "User", "content": "4"}, "role = 'User'; write 'user'"),
    "a thinking part": (
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "add"}]},
        r"content\[0\] = .* no text part; write it into the message's 'reasoning_content'",
    ),
    "a part with a tool's result": (
        {"role": "user", "content": [{"type": "tool_result", "content": "22"}]},
        "write it as a message of role tool",
    ),
    "a turn that was cut off": (
        {"role": "assistant", "content": "4", "finish_reason": "length"},
        "finish_reason = 'length': the turn was cut off .*\"truncated\": true",
    ),
    "a key twice in arguments": (
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": {"y": 1, "y": 2}}'}]},
        "has a key twice",
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


WEIGHT = '"weight": 0 in an assistant'
UNREAD = {
    "train": (False, WEIGHT),
    "loss": (0, WEIGHT),
    "loss_mask": ([0, 1], WEIGHT),
    "loss_weight": (0.5, WEIGHT),
    "mask": (1, WEIGHT),
    "masked": (True, WEIGHT),
    "is_trainable": (False, WEIGHT),
    "ignore": (True, WEIGHT),
    "loss_scale": (0.0, WEIGHT),
    "train_detail": ([{"begin_offset": 0, "train": False}], WEIGHT),
    "weights": (0, "did you mean 'weight'"),
    "Weight": (0, "did you mean 'weight'"),
    "wieght": (0, "did you mean 'weight'"),
    "reward": (0, "a reward is of a whole row"),
    "tool_cals": ([CALL], "did you mean 'tool_calls'"),
    "reasoningContent": ("add", "did you mean 'reasoning_content'"),
    "thoughts": ("add", "write thinking as a text into 'reasoning_content'"),
    "reasoning_details": ([{"text": "add"}], "write thinking as a text into 'reasoning_content'"),
}


@pytest.mark.parametrize("key", UNREAD)
@pytest.mark.parametrize("text", [{"role": "assistant", "content": "4"}, {"from": "gpt", "value": "4"}])
def test_a_key_that_says_something_and_is_not_read_is_refused(key: str, text: dict[str, Any]) -> None:
    value, expected = UNREAD[key]
    with pytest.raises(RowProblem, match=rf"messages\[1\]\.{key} = .* would not be read[;,] .*{expected}"):
        read_messages([USER, {**text, key: value}])
    for empty in (None, "", []):
        read_messages([USER, {**text, key: None if key == "reward" else empty}])


@pytest.mark.parametrize(
    ("message", "meant"),
    [
        ({"role": "assistant", "contnet": "4"}, "content"),
        ({"role": "user", "contents": "4"}, "content"),
        ({"from": "gpt", "values": "4"}, "value"),
    ],
)
def test_a_misspelt_text_is_no_empty_turn(message: dict[str, Any], meant: str) -> None:
    with pytest.raises(RowProblem, match=f"would not be read; did you mean '{meant}'"):
        read_messages([message])


@pytest.mark.parametrize(
    "others",
    [
        {"id": "m1", "timestamp": 3, "annotations": [1], "context": "c", "height": 3, "logprobs": [0.5]},
        {"train": True, "loss": 1.0, "masked": False, "ignore": False, "loss_scale": 1},
        {"finish_reason": "stop", "stop_reason": "end_turn"},
        {"weight": 0, "finish_reason": "length"},
        {"reasoning": "add", "reasoning_details": [{"text": "add"}], "thinking_blocks": [{}]},
        {"contents": "of the page"},
        {"is_reasoning": False, "isThinking": False, "reasoning_id": "rs_1", "reasoning_ms": 12},
        {"thought": False, "thoughts": 0, "tool_call": False, "weighted": False},
        {"weight": 0, "thinking_blocks": [{"type": "redacted_thinking", "data": "x"}]},
    ],
)
def test_keys_that_change_nothing_pass(others: dict[str, Any]) -> None:
    user = {**USER, "train": False, "mask": 0, "loss_mask": [0, 0], "reward": 0.0, "thoughts": "of the user"}
    user |= {"tool_call": {"name": "f"}, "is_reasoning": True}
    asked, answered = read_messages([user, {"role": "assistant", "content": "4", **others}])
    assert (asked["content"], answered["content"]) == ("Hi", "4")


@pytest.mark.parametrize(
    "call",
    [
        {"name": "f", "parameters": {"x": 1}},
        {"name": "f", "args": {"x": 1}, "arguments": None},
        {"type": "function", "function": {"name": "f", "input": {"x": 1}}},
        {"type": "function", "function": {"name": "f"}, "arguments": "{}"},
        {"name": "f", "arguements": {"x": 1}},
    ],
)
def test_arguments_under_another_key_are_refused(call: dict[str, Any]) -> None:
    with pytest.raises(
        RowProblem, match=r"tool_calls\[0\]\.\S+ = .* the arguments of a call go into function\.arg"
    ):
        read_messages([{"role": "assistant", "tool_calls": [call]}])


def test_a_call_without_arguments_has_none() -> None:
    function = {"name": "f", "parameters": {}, "description": "Does f."}
    (message,) = read_messages([{"role": "assistant", "tool_calls": [{"function": function}]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {}


def test_a_list_written_as_text_is_named() -> None:
    with pytest.raises(RowProblem, match=r"messages is a list written as JSON text; parse it"):
        read_messages('[{"role": "user", "content": "Hi"}]')


def test_weight_zero_on_every_turn_leaves_no_decision() -> None:
    messages = read_messages([USER, {"role": "assistant", "content": "4", "weight": 0}])
    with pytest.raises(RowProblem, match="weight is 0 on every assistant turn"):
        check_order(messages)
