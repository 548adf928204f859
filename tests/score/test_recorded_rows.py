"""One row of each generator's own shape gives the ids and log-probs it holds; a damaged one is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from pear_megatron.data.errors import RowProblem
from tests.score.recorded_cases import LOGPROBS, TEXT, case, check_tokens, read, refuses

WITH_IDS = ["sglang", "slime", "vllm_offline"]


def verl() -> dict[str, Any]:
    """A DataProto's fields, padded as they are."""
    sample = case("slime")
    prompt, response = sample["tokens"][:-11], sample["tokens"][-11:]
    return {
        "prompts": [0, 0, *prompt],
        "responses": [*response, 0],
        "attention_mask": [0, 0] + [1] * 47 + [0],
        "response_mask": [1] * 11 + [0],
        "rollout_log_probs": [*LOGPROBS, 0.0],
        "token_level_scores": [0.0] * 10 + [0.5, 0.0],
        "uid": "u1",
    }


def responses() -> dict[str, Any]:
    """The Responses row, its text as its tokens say it."""
    row = case("oai_responses")
    row["response"]["output"][0]["content"][0]["text"] = TEXT
    return row


def readable() -> dict[str, dict[str, Any]]:
    """Rows that can be read."""
    named = {name: case(name) for name in [*WITH_IDS, "n2"]}
    return {**named, "temp_body": case("temp_body"), "verl": verl(), "responses": responses()}


# Nothing else in slime's and vLLM's rows says which tokens the prompt has.
ONLY_WORD = ("tokens", "prompt_token_ids")
NAMES = [*WITH_IDS, "n2", "temp_body", "verl", "responses"]


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_log_probs_are_those_in_the_file(name: str) -> None:
    rows = read(readable()[name], raw=name == "temp_body")
    assert len(rows) == (2 if name == "n2" else 1)
    for row in rows:
        check_tokens(row)
        assert row.truncated is None


@pytest.mark.parametrize("name", [*WITH_IDS, "verl"])
def test_rows_with_ids_need_no_tokenizer(name: str) -> None:
    (row,) = read(readable()[name], with_tokenizer=False)
    check_tokens(row)


def test_a_batch_line_is_refused_by_the_temperature_in_its_body() -> None:
    refuses(r"body\.temperature = 0\.7, body\.top_p = 0\.9: .*--raw-logprobs", case("temp_body"))


def test_tool_calls_that_are_written_another_way_are_spoken_of() -> None:
    refuses("tool calls", case("tool"))


def test_responses_whose_text_is_not_its_tokens_is_refused_by_name() -> None:
    refuses(r"OpenAI Responses: output\[0\]\.content", case("oai_responses"))


def damages(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """(place, what was done, the damaged value) for every place; of lists the first and the last entry."""
    if isinstance(value, dict):
        for key, inner in value.items():
            for place, what, damaged in damages(inner, (*path, key)):
                yield place, what, {**value, key: damaged}
            yield (*path, key), "removed", {other: v for other, v in value.items() if other != key}
            yield (*path, key), "null", {**value, key: None}
            if isinstance(inner, (int, float)):
                yield (*path, key), "a text", {**value, key: str(inner)}
            if isinstance(inner, int) and ("tokens" in key or "length" in key):
                yield (*path, key), "one more", {**value, key: inner + 1}
    if isinstance(value, list) and value:
        for i in {0, len(value) - 1}:
            for place, what, damaged in damages(value[i], (*path, i)):
                yield place, what, [*value[:i], damaged, *value[i + 1 :]]
            yield (*path, i), "removed", value[:i] + value[i + 1 :]
            yield (*path, i), "null", [*value[:i], None, *value[i + 1 :]]
            yield (*path, i), "doubled", [*value[: i + 1], *value[i:]]
            if isinstance(value[i], (int, float)):
                yield (*path, i), "a text", [*value[:i], str(value[i]), *value[i + 1 :]]


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_row_is_refused_or_means_the_same(name: str) -> None:
    row = readable()[name]
    refused = 0
    for place, what, damaged in damages(copy.deepcopy(row)):
        if place[0] in ONLY_WORD and len(place) == 2 and what in ("removed", "doubled"):
            continue
        try:
            found = read(damaged, raw=name == "temp_body")
        except RowProblem:
            refused += 1
            continue
        for one in found:  # one of several answers may be gone, nothing else
            try:
                check_tokens(one)
            except AssertionError as error:
                raise AssertionError(f"{place} {what}: {error}") from error
    assert refused > 10
