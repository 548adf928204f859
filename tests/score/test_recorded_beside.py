"""What stands beside a recorded answer is read, refused, or named at the end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pear_megatron.data import DataError
from pear_megatron.data.errors import RowProblem
from pear_megatron.score.recorded.answers import is_cut
from pear_megatron.score.rows import RowReader
from tests.score.jobs import score_rows
from tests.score.recorded_cases import LOGPROBS, RESPONSE, case, check_tokens, prompt_ids, read, reader
from tests.score.test_recorded import message_log, train_data

ANSWERS: dict[str, dict[str, Any]] = {
    "chat": case("n2"),
    "sglang": case("sglang"),
    "slime": case("slime"),
    "vllm_offline": case("vllm_offline"),
    "message_log": message_log(),
    "train_data": train_data(),
    "verl": {
        "prompts": prompt_ids(),
        "responses": RESPONSE,
        "response_mask": [1] * 11,
        "rollout_log_probs": LOGPROBS,
    },
}


def without_reward(name: str) -> dict[str, Any]:
    rewards = ("reward", "rewards", "total_reward")
    return {field: value for field, value in ANSWERS[name].items() if field not in rewards}


def whole(**fields: Any) -> dict[str, Any]:
    """A trajectory that the row gives, scored by vLLM as a prompt."""
    ids, values = prompt_ids() + RESPONSE, [-1.0] * 36 + LOGPROBS
    entries = [None, *({str(i): {"logprob": v}} for i, v in list(zip(ids, values, strict=True))[1:])]
    return {"input_ids": ids, "loss_mask": [0] * 36 + [1] * 11, "prompt_logprobs": entries, **fields}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("misspelt", ["rewrad", "Reward", "reward_"])
def test_a_misspelt_reward_is_no_reward_of_1(name: str, misspelt: str) -> None:
    with pytest.raises(RowProblem, match=f"unknown field '{misspelt}'; did you mean 'reward'"):
        read({**without_reward(name), misspelt: -0.5})


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("tempreature", "temperature"), ("truncate", "truncated"), ("behaviour_logprobs", "behavior_logprobs")],
)
def test_other_names_that_matter_are_not_misread_either(misspelt: str, meant: str) -> None:
    with pytest.raises(RowProblem, match=f"unknown field '{misspelt}'; did you mean '{meant}'"):
        read({**case("n2"), misspelt: 0.7})
    with pytest.raises(RowProblem, match="did you mean 'loss_mask'"):
        read({"loss_msk" if k == "loss_mask" else k: v for k, v in case("slime").items()})


@pytest.mark.parametrize("name", ANSWERS)
def test_columns_of_tokens_that_the_row_does_not_say_are_refused(name: str) -> None:
    with pytest.raises(
        RowProblem, match="token_weights beside a recorded answer cannot be placed .* add it to the file"
    ):
        read({**ANSWERS[name], "token_weights": [1.0] * 47})
    with pytest.raises(RowProblem, match="the row has its log-probs twice"):
        read({**ANSWERS[name], "behavior_logprobs": [-1.0] * 47})


def test_columns_of_tokens_that_the_row_says_are_kept() -> None:
    weights = [0.0] * 36 + [0.5] * 11
    (found,) = read(whole(token_weights=weights))
    np.testing.assert_array_equal(found.trajectory.token_weights, np.float32(weights))
    check_tokens(found)
    with pytest.raises(RowProblem, match="token_weights has 3 entries and input_ids 47"):
        read(whole(token_weights=[1.0, 1.0, 1.0]))
    with pytest.raises(RowProblem, match="'rewrad'; did you mean 'reward'"):
        read(whole(rewrad=-1))


def test_what_belongs_beside_the_answer_is_not_lost_within_it() -> None:
    row = case("n2")
    row["response"]["reward"] = -1
    with pytest.raises(RowProblem, match=r"response\.reward is not read there; put it beside the answer"):
        read(row)
    row = case("n2")
    row["response"]["choices"][1]["rewrad"] = -1
    with pytest.raises(RowProblem, match=r"'choices\[1\]\.rewrad'; did you mean 'reward'"):
        read(row)
    row = case("sglang")
    del row["reward"]
    row["response"]["reward"] = -1
    assert read(row)[0].trajectory.reward == -1


def unread(rows: RowReader) -> dict[str, int]:
    """The notes on fields that nobody reads."""
    return {note: count for note, count in rows.notes.items() if note.startswith(UNREAD)}


UNREAD = "rows with fields that are not read ("
OTHER_WORDS = ("reward_model", "raw_reward", "prompt_id", "response_text", "forward", "token_masks", "labels")


@pytest.mark.parametrize("name", ANSWERS)
def test_other_fields_are_taken_and_named_once(name: str) -> None:
    others = dict.fromkeys(OTHER_WORDS, 1)
    rows = reader()
    for _ in range(2):
        assert read({**ANSWERS[name], **others}, by=rows)
    ((note, count),) = unread(rows).items()
    assert count == 2
    read_there = ("reward_model",) if name == "verl" else ()
    assert [word for word in OTHER_WORDS if word not in note] == list(read_there)


@pytest.mark.parametrize("name", ANSWERS)
def test_what_generators_write_is_not_spoken_of(name: str) -> None:
    rows = reader()
    row = copy.deepcopy(ANSWERS[name])
    row |= row.pop("response") if isinstance(row.get("response"), dict) else {}
    read({**row, "metadata": {"anything": 1}, "max_tokens": 5, "top_p": 1}, by=rows)
    assert not unread(rows)


def test_the_command_names_file_line_and_field(tmp_path: Path) -> None:
    row = {**case("vllm_offline"), "rewrad": -0.5}
    with pytest.raises(DataError, match=r"in\.jsonl:1: unknown field 'rewrad'; did you mean 'reward'"):
        score_rows(tmp_path, [row], None, backend="import")
    score_rows(tmp_path, [{**case("vllm_offline"), "advantage": -0.5}], None, backend="import")
    counts = (pq.read_schema(tmp_path / "out.parquet").metadata)[b"pear_megatron.score"].decode()
    assert "rows with fields that are not read (advantage;" in counts


def without_end(name: str) -> dict[str, Any]:
    """An answer that a stop string ended: its last token is none that ends a turn."""
    row = case(name) if name != "chat" else chat_with_ids()
    if name == "sglang":
        meta = row["response"]["meta_info"]
        meta["output_token_logprobs"].pop()
        row["response"]["output_ids"].pop()
        meta |= {"completion_tokens": 10, "finish_reason": {"type": "stop", "matched": "\u00ef"}}
    elif name == "vllm_offline":
        output = row["outputs"][0]
        output |= {"token_ids": RESPONSE[:-1], "logprobs": output["logprobs"][:-1], "stop_reason": "\u00ef"}
    else:
        choice = row["response"]["choices"][0]
        choice["logprobs"]["content"].pop()
        choice |= {"token_ids": RESPONSE[:-1], "stop_reason": "\u00ef"}
        row["response"]["usage"]["completion_tokens"] = 10
    return row


def chat_with_ids() -> dict[str, Any]:
    row = case("temp_body")
    return {"messages": row["body"]["messages"], "response": row["response"]["body"]}


ENDLESS = "responses that do not end with an end token"
UNFINISHED = "responses marked truncated because they have no finish_reason"


def notes_after(row: dict[str, Any], **options: Any) -> tuple[list[bool | None], list[str]]:
    """(the rows' marks, the starts of the notes)."""
    rows = reader(**options)
    marks = [found.truncated for found in read(row, by=rows)]
    known = [start for note in rows.notes for start in (ENDLESS, UNFINISHED) if note.startswith(start)]
    assert len(known) == len(rows.notes)
    return marks, known


@pytest.mark.parametrize("name", ["sglang", "vllm_offline", "chat"])
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_responses_that_a_stop_string_ended_are_counted(name: str, with_tokenizer: bool) -> None:
    row = without_end(name)
    assert notes_after(row, with_tokenizer=with_tokenizer) == ([None], [ENDLESS])
    assert notes_after({**row, "truncated": True}, with_tokenizer=with_tokenizer) == ([True], [])


@pytest.mark.parametrize("name", ["slime", "verl"])
def test_responses_of_rollouts_that_do_not_end_are_counted(name: str) -> None:
    row = copy.deepcopy(ANSWERS[name])
    assert notes_after(row) == ([None], [])
    mask = "loss_mask" if name == "slime" else "response_mask"
    assert notes_after({**row, mask: [1] * 10 + [0]}) == ([None], [ENDLESS])


def test_an_answer_without_a_finish_reason_is_whole_only_with_an_end_token() -> None:
    row = chat_with_ids()
    row["response"]["choices"][0]["finish_reason"] = None
    assert notes_after(row) == ([None], [])
    assert notes_after(row, with_tokenizer=False) == ([True], [UNFINISHED])
    assert notes_after({**row, "truncated": False}, with_tokenizer=False) == ([False], [])
    row = without_end("chat")
    row["response"]["choices"][0] |= {"finish_reason": None, "stop_reason": None}
    assert notes_after(row) == ([True], [UNFINISHED])
    assert notes_after({**row, "truncated": False}) == ([False], [ENDLESS])
    row = without_end("sglang")
    row["response"]["meta_info"]["finish_reason"] = None
    assert notes_after(row) == ([True], [UNFINISHED])
    row = case("n2")
    for choice in row["response"]["choices"]:
        choice["finish_reason"] = None
    assert notes_after(row) == ([None, None], [])


def test_what_together_and_mistral_write_is_read() -> None:
    row = case("n2")
    row["prompt"] = []
    row["response"]["choices"][0]["finish_reason"] = "eos"
    assert notes_after(row) == ([None, None], [])
    assert is_cut("model_length")
