"""Fields that are not the package's: refused, with what to write, where they say something, and named where not."""

from __future__ import annotations

from typing import Any

import pytest

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.names import UnreadFields, form_of, unread_names

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PAIR = {"prompt": "Hi", "response": "Hello"}
IDS = {"input_ids": [1, 2], "loss_mask": [0, 1]}

REFUSED: list[tuple[dict[str, Any], str]] = [
    (CHAT | {"system_message": "Be brief."}, "write it as the first message, of role system"),
    (CHAT | {"available_tools": [{"name": "f"}]}, "write the functions into 'tools'"),
    (CHAT | {"images": ["a.png"]}, "only text can be trained on"),
    (CHAT | {"score": 0.2}, "a grade is a 'reward'"),
    (IDS | {"rewards": 1.0}, "a grade is a 'reward'"),
    (PAIR | {"label": False}, "a grade is a 'reward'"),
    (IDS | {"logprobs": [0.0, -1.0]}, "did you mean 'behavior_logprobs'"),
    (IDS | {"attention_mask": [1, 0]}, "padding was left in"),
    (PAIR | {"history": [["a", "b"]]}, "the earlier turns in 'prompt'"),
    (PAIR | {"input": "Hallo"}, "put it into the prompt"),
    (CHAT | {"finish_reason": "length"}, 'write "truncated": true'),
    (CHAT | {"chat_template_kwarg": {"a": 1}}, "did you mean 'chat_template_kwargs'"),
    ({"conversation": CHAT["messages"]}, "did you mean 'conversations'"),
    (
        PAIR | {"reasoning_content": "add"},
        "into the answer as <think>...</think>, or into its message under this name",
    ),
    (CHAT | {"thinking": "add"}, "into the answer as <think>"),
    (CHAT | {"enable_thinking": False}, "write it into 'chat_template_kwargs'"),
]
UNREAD: list[tuple[dict[str, Any], list[str]]] = [
    (CHAT | {"source": "web", "uuid": "u", "idx": 3}, ["source", "uuid", "idx"]),
    (CHAT | {"problem": "2+2?", "prompt_id": "p"}, ["problem", "prompt_id"]),
    (CHAT | {"prompt": "Hi"}, ["prompt"]),
    (CHAT | {"reasoning": "off"}, ["reasoning"]),
    ({"prompt": "Hi", "response": "<think>add</think>4", "thinking": "add"}, ["thinking"]),
    ({"messages": [CHAT["messages"][1] | {"reasoning": "it's"}], "reasoning": "it's"}, ["reasoning"]),
    (CHAT | {"system": "", "images": [], "topic": None}, []),
    (CHAT | {"system": "Be brief.", "functions": [{"name": "f"}]}, []),
    (CHAT | {"label": True, "conversation_id": "c", "instance_id": "i"}, ["label", "conversation_id", "instance_id"]),
    (IDS | {"system": "Be brief.", "attention_mask": [1, 1]}, ["system", "attention_mask"]),
    (PAIR | {"truncated": True, "finish_reason": "length"}, ["finish_reason"]),
]  # fmt: skip
NO_FORM: list[tuple[dict[str, Any], str]] = [
    ({"instruction": "a", "input": "b", "output": "c"}, "'response' for 'output', 'prompt' for 'instruction' and"),
    ({"prompt": "a", "completion": "b"}, "missing field 'response'.*did you mean 'response' for 'completion'"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "the bad one as a row with a 'reward' below zero"),
    (
        {"messages": CHAT["messages"][:1], "chosen": [], "rejected": []},
        "the answers are not among the messages: .* below zero.*docs/datasets.md",
    ),
    ({"text": "a"}, "does not say which part of it the policy wrote"),
    ({"input_ids": [1], "labels": [-100]}, "for 'labels' give loss_mask"),
    ({"items": []}, "did you mean 'messages' for 'items'. docs/datasets.md has the lines"),
    (CHAT | {"response": "b"}, "messages and prompt.response; keep one .docs/datasets.md"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), REFUSED, ids=lambda value: str(value)[-40:])
def test_what_says_something_is_refused_with_what_to_write(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowProblem, match="unknown field") as caught:
        unread_names(row)
    assert said in str(caught.value)


@pytest.mark.parametrize(("row", "names"), UNREAD, ids=lambda value: str(value)[-40:])
def test_the_rest_is_named(row: dict[str, Any], names: list[str]) -> None:
    assert unread_names(row) == names
    assert form_of(row, names)


@pytest.mark.parametrize(("row", "said"), NO_FORM, ids=lambda value: str(value)[:40])
def test_rows_of_another_form_are_answered_with_ours(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowProblem, match=said):
        form_of(row, unread_names(row))


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(RowProblem, match=r"'history'.*; unknown field 'score'"):
        unread_names(PAIR | {"history": [["a", "b"]], "score": 1})


def test_the_note_counts_rows_and_names_some() -> None:
    unread = UnreadFields()
    assert unread.note == {}
    unread.add(["source", "uuid"])
    unread.add([])
    unread.add([f"field_{i}" for i in range(12)])
    ((said, count),) = unread.note.items()
    assert (count, "source, uuid, field_0" in said, "and 2 more" in said) == (2, True, True)
