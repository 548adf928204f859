"""Recorded log-probs: every format is aligned with its tokens, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pear_megatron.data import DataError
from pear_megatron.data.errors import RowProblem
from pear_megatron.score.recorded.tokens import Tokens
from tests.byte_tokenizer import make_byte_tokenizer
from tests.score.jobs import Row, opened, score_rows

MESSAGES = [{"role": "user", "content": "1+1?"}]
ANSWER = "two"
END = "<|im_end|>"
LOGPROBS = [-0.1, -0.2, -0.3, -0.4]  # of t, w, o and the end of turn


def prompt_ids() -> list[int]:
    encoded = make_byte_tokenizer().apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])


def answer_ids() -> list[int]:
    return list(make_byte_tokenizer()(ANSWER + END)["input_ids"])


def chat(*, ids: bool = False, ids_as_text: bool = False, **fields: Any) -> Row:
    """A row with vLLM's chat response."""
    tokens = [f"token_id:{i}" for i in answer_ids()] if ids_as_text else [*ANSWER, END]
    content = [
        {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
        for token, logprob in zip(tokens, LOGPROBS, strict=True)
    ]
    choice: Row = {
        "index": 0,
        "message": {"role": "assistant", "content": ANSWER},
        "logprobs": {"content": content},
        "finish_reason": "stop",
    }
    response: Row = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "teacher",
        "choices": [choice],
        "usage": {"prompt_tokens": len(prompt_ids()), "completion_tokens": 4},
    }
    if ids:
        choice["token_ids"], response["prompt_token_ids"] = answer_ids(), prompt_ids()
    return {"response": response, **({} if ids else {"messages": MESSAGES}), **fields}


def completion(**fields: Any) -> Row:
    """A row that is vLLM's completions response itself, beside the request's prompt."""
    tokens = [f"token_id:{i}" for i in answer_ids()]
    choice = {
        "index": 0,
        "text": ANSWER,
        "logprobs": {"tokens": tokens, "token_logprobs": LOGPROBS, "top_logprobs": None, "text_offset": []},
        "finish_reason": "stop",
    }
    return {"object": "text_completion", "choices": [choice], "prompt": prompt_ids(), **fields}


def given(**fields: Any) -> Row:
    """A whole trajectory, scored by vLLM as a prompt."""
    ids = prompt_ids() + answer_ids()
    values = [-1.0] * len(prompt_ids()) + LOGPROBS
    entries: list[Any] = [
        {str(i): {"logprob": value, "rank": 2, "decoded_token": "?"}, "9999": {"logprob": -0.01, "rank": 1}}
        for i, value in zip(ids, values, strict=True)
    ]
    mask = [0] * len(prompt_ids()) + [1] * 4
    return {
        "input_ids": ids,
        "loss_mask": mask,
        "response": {"prompt_logprobs": [None, *entries[1:]]},
        **fields,
    }


def echoed(**fields: Any) -> Row:
    """The same by way of a completion with echo."""
    row = given(**fields)
    tokens = [f"token_id:{i}" for i in row["input_ids"]]
    values = [None, *[-1.0] * (len(prompt_ids()) - 1), *LOGPROBS]
    choice = {"text": "", "logprobs": {"tokens": [*tokens, "token_id:5"], "token_logprobs": [*values, -3.0]}}
    return row | {"response": {"object": "text_completion", "choices": [choice]}}


def batch_job(**fields: Any) -> Row:
    """What `vllm run-batch` and OpenAI's batches write."""
    body = chat(ids=True)["response"]
    return {
        "id": "b-1",
        "custom_id": "mine",
        "response": {"status_code": 200, "body": body},
        "error": None,
        **fields,
    }


def message_log(**fields: Any) -> Row:
    """NeMo-RL's message log: an assistant message without generation_logprobs is history."""
    history = [
        {"role": "user", "content": "", "token_ids": [5, 6]},
        {"role": "assistant", "content": "", "token_ids": [7]},
    ]
    turn = {"role": "assistant", "content": "", "token_ids": answer_ids(), "generation_logprobs": LOGPROBS}
    return {
        "message_log": [*history, {"role": "user", "token_ids": [8]}, turn],
        "total_reward": 0.5,
        **fields,
    }


def train_data(**fields: Any) -> Row:
    """A line of NeMo-RL's train_data_stepN.jsonl: a batch of one, padded."""
    prompt, padding = [5, 6, 7, 8], [0, 0]
    return {
        "content": [["q", "two"]],
        "rewards": [0.5],
        "input_lengths": [8],
        "token_ids": [[*prompt, *answer_ids(), *padding]],
        "token_loss_mask": [[0] * 4 + [1] * 4 + [0] * 2],
        "sample_loss_mask": [1.0],
        "advantages": [[0.1] * 10],
        "generation_logprobs": [[0.0] * 4 + LOGPROBS + [0.0] * 2],
        "prev_logprobs": [[0.0] * 10],
        "idx": 3,
        **fields,
    }


FORMATS: dict[str, Callable[..., Row]] = {
    "chat, texts": chat,
    "chat, ids": lambda **f: chat(ids=True, **f),
    "chat, token_id:N": lambda **f: chat(ids_as_text=True, **f),
    "completion": completion,
    "prompt_logprobs": given,
    "echo": echoed,
    "batch job": batch_job,
    "message_log": message_log,
    "train_data": train_data,
}


def imported(folder: Path, row: Row, model: Path | None = None) -> Row:
    (found,) = score_rows(folder, [row], model, backend="import")
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_recorded_log_probs_stand_at_their_tokens(name: str, tmp_path: Path, tiny_llama: Path) -> None:
    row = imported(tmp_path, FORMATS[name](), tiny_llama)
    context = len(row["input_ids"]) - 4
    assert row["input_ids"][context:] == answer_ids()
    assert row["loss_mask"] == [False] * context + [True] * 4
    np.testing.assert_allclose(row["behavior_logprobs"], [0] * context + LOGPROBS, rtol=1e-6)
    if name not in ("message_log", "train_data"):
        assert row["input_ids"][:context] == prompt_ids()
    else:
        assert row["input_ids"][:context] == [5, 6, 7, 8]
        assert row["reward"] == 0.5
    assert len(opened(tmp_path / "out.parquet", tokenizer=str(tiny_llama))) == 1


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "chat, texts"])
def test_recorded_ids_need_no_tokenizer(name: str, tmp_path: Path) -> None:
    row = FORMATS[name]()
    if name == "chat, token_id:N":
        row |= {"messages": None, "prompt_token_ids": prompt_ids()}
    assert imported(tmp_path, row)["input_ids"][-4:] == answer_ids()


def test_response_cut_at_its_length_is_marked_truncated(tmp_path: Path, tiny_llama: Path) -> None:
    row = chat(reward=2)
    choice = row["response"]["choices"][0]
    choice["finish_reason"] = "length"
    del choice["logprobs"]["content"][-1]
    row["response"]["usage"]["completion_tokens"] = 3
    found = imported(tmp_path, row, tiny_llama)
    assert found["truncated"] is True
    assert found["input_ids"] == prompt_ids() + answer_ids()[:3]
    assert found["reward"] == 2


def changed(row: Row, *path: Any, to: Any = None, by: Callable[[Any], Any] | None = None) -> Row:
    """A deep copy with one value replaced, or taken away."""
    row = copy.deepcopy(row)
    place: Any = row
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = by(place[path[-1]]) if by else to
    return row


def rotated(values: list[Any]) -> list[Any]:
    return [*values[1:], values[0]]


CHOICE = ("response", "choices", 0)
REFUSED = {
    "texts shifted": (
        changed(chat(), *CHOICE, "logprobs", "content", by=rotated),
        "logprobs.content[0] is 'w', but the token there is id",
    ),
    "ids shifted against the texts": (
        changed(chat(ids=True), *CHOICE, "token_ids", by=rotated),
        "the log-probs are shifted or belong to other tokens",
    ),
    "ids in texts shifted": (
        changed(chat(ids_as_text=True), *CHOICE, "token_ids", to=rotated(answer_ids())),
        "logprobs.content[0] is 'token_id:",
    ),
    "end of turn not recorded": (
        changed(chat(), *CHOICE, "logprobs", "content", by=lambda content: content[:-1]),
        "logprobs.content has 3 tokens and the response 4 (its end of turn is one of them)",
    ),
    "no logprobs": (changed(chat(), *CHOICE, "logprobs"), "choices[0].logprobs is missing: ask the server"),
    "another text": (changed(chat(), *CHOICE, "message", "content", to="too"), "logprobs.content[1] is 'w'"),
    "another prompt": (
        changed(chat(), "messages", to=[{"role": "user", "content": "1+11?"}]),
        "usage.prompt_tokens = ",
    ),
    "no prompt": (changed(chat(), "messages"), "no prompt: give the request's messages"),
    "empty response": (
        changed(chat(), *CHOICE, "logprobs", "content", to=[]), "logprobs.content is empty: an empty response",
    ),
    "server's word for none": (
        changed(chat(), *CHOICE, "logprobs", "content", 1, "logprob", to=-9999.0),
        "logprobs.content[1]: log-prob -9999",
    ),
    "completion shifted": (
        changed(completion(), "choices", 0, "logprobs", "token_logprobs", by=lambda v: v[1:]),
        "logprobs.tokens has 4 tokens and 3 log-probs",
    ),
    "prompt_logprobs shifted": (
        changed(given(), "response", "prompt_logprobs", by=lambda v: [None, *rotated(v[1:])]),
        "prompt_logprobs[1] is of token ",
    ),
    "prompt_logprobs of fewer tokens": (
        changed(given(), "response", "prompt_logprobs", by=lambda v: v[:-1]), "entries and the trajectory",
    ),
    "prompt_logprobs null on a decision": (
        changed(given(), "response", "prompt_logprobs", -1), "null on a decision",
    ),
    "echo shifted": (
        changed(echoed(), *CHOICE, "logprobs", "tokens", by=rotated), "logprobs.tokens[0] is 'token_id:",
    ),
    "trajectory without its prompt's log-probs": (
        chat(ids=True) | {"messages": [*MESSAGES, {"role": "assistant", "content": ANSWER}]},
        "the row gives the whole trajectory, so the log-probs of all of it are needed",
    ),
    "failed request": (batch_job(error={"code": 500}), "the request failed"),
    "message_log of other lengths": (
        changed(message_log(), "message_log", 3, "generation_logprobs", by=lambda v: v[:-1]),
        "message_log[3]: generation_logprobs has 3 entries and token_ids 4",
    ),
    "message_log without ids": (changed(message_log(), "message_log", 2, "token_ids", by=lambda v: "[8]"), "token_ids"),
    "message_log trained on but not recorded": (
        changed(message_log(), "message_log", 1, "token_loss_mask", to=[1]),
        "message_log[1] is trained on but has no generation_logprobs",
    ),
    "train_data of other lengths": (
        changed(train_data(), "generation_logprobs", 0, by=lambda v: v[:-1]), "generation_logprobs has 9 entries",
    ),
    "train_data too long": (changed(train_data(), "input_lengths", to=[11]), "input_lengths = 11"),
    "another temperature": (chat(temperature=0.7), "temperature = 0.7"),
    "positive": (changed(chat(), *CHOICE, "logprobs", "content", 0, "logprob", to=0.3), "is positive"),
    "no known form": ({"prompt": "q", "logprobs": [1, 2]}, "no recorded log-probs among the fields prompt, logprobs"),
    "damaged": (changed(chat(), *CHOICE, "logprobs", "content", 0, to="two"), "must be a list of {token, logprob}"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_aligned_for_certain_is_refused(name: str, tmp_path: Path, tiny_llama: Path) -> None:
    row, words = REFUSED[name]
    with pytest.raises(DataError) as error:
        imported(tmp_path, row, tiny_llama)
    assert "in.jsonl:1: " in str(error.value)
    assert words in str(error.value)
    assert not (tmp_path / "out.parquet").exists()


def test_invalid_rollouts_are_marked_so_that_training_drops_them(tmp_path: Path) -> None:
    assert imported(tmp_path, train_data(sample_loss_mask=[0.0]))["truncated"] is True


@pytest.mark.parametrize("space", ["Ġ", "▁"])
def test_white_space_counts_where_a_vocabulary_holds_it(space: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = space == "Ġ"
    made = Tokenizer(
        models.WordLevel({"Blue": 0, space + "Blue": 1, space: 2, "<unk>": 3}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel() if byte_level else pre_tokenizers.Metaspace()
    made.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    tokens = Tokens(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"), None)
    tokens.check([1, 0], [" Blue", "Blue"], "logprobs")
    if byte_level:
        with pytest.raises(
            RowProblem, match=r"logprobs\[0\] is ' Blue', but the token there is id 0 \('Blue'\)"
        ):
            tokens.check([0], [" Blue"], "logprobs")
    else:  # whose decoding of one token loses it
        tokens.check([1], ["Blue"], "logprobs")
