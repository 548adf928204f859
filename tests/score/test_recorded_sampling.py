"""Log-probs that may be those of a tempered or truncated distribution are refused, wherever the row says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pear_megatron.cli import app
from pear_megatron.data.errors import RowProblem
from pear_megatron.score.recorded.sampling import check_sampling
from tests.score.jobs import write_jsonl
from tests.score.recorded_cases import case, read

PLACES = {
    "temperature": {"temperature": 0.7},
    "body.temperature": {"body": {"temperature": 0.7}},
    "body.extra_body.top_k": {"body": {"extra_body": {"top_k": 20}}},
    "request.sampling_params.top_p": {"request": {"sampling_params": {"top_p": 0.9}}},
    "sampling_params.temperature": {"sampling_params": {"temperature": 0}},
    "sampling_parameters.min_p": {"sampling_parameters": {"min_p": 0.05}},
    "generation_config.do_sample": {"generation_config": {"do_sample": False}},
    "params.typical_p": {"params": {"typical_p": 0.9}},
    "metadata.sampling_params.top_p": {"metadata": {"sampling_params": {"top_p": 0.9}}},
    "metadata.temperature": {"metadata": json.dumps({"temperature": 0.7})},
    "manifest.temperature": {"manifest": {"temperature": 1.2}},
    "response.body.temperature": {"response": {"body": {"temperature": 0.2}}},
    "meta_info.temperature": {"meta_info": {"temperature": 0.6}},
    "request_params.temperature": {"request_params": {"temperature": 0.7}},
    "sampling.top_p": {"sampling": {"top_p": 0.8}},
    "config.temperature": {"config": {"temperature": 0.7}},
    "invocation_params.temperature": {"invocation_params": {"temperature": 0.7}},
    "modelParameters.temperature": {"modelParameters": {"temperature": 0.7}},
    "samplingParams.topK": {"samplingParams": {"topK": 20}},
    "generationConfig.topP": {"generationConfig": {"topP": 0.9}},
    "hyperparameters.temperature": {"hyperparameters": {"temperature": 0.7}},
    "responses_create_params.temperature": {"responses_create_params": {"temperature": 0.7}},
    "generation_params.top_k": {"generation_params": {"top_k": 40}},
    "sampling_args.min_p": {"sampling_args": {"min_p": 0.1}},
    "generate_kwargs.repetition_penalty": {"generate_kwargs": {"repetition_penalty": 0.5}},
    "metadata.sampling.temperature": {"metadata": {"sampling": {"temperature": 0.7}}},
    "body.options.temperature": {"body": {"options": {"temperature": 0.7}}},
    "request.json.extra_body.top_p": {"request": {"json": {"extra_body": {"top_p": 0.7}}}},
    "sampling_params.top_p": {"sampling_params": json.dumps({"top_p": 0.7})},
    "rollout_top_p_token_ids": {"rollout_top_p_token_ids": [1, 2]},
}
PENALISING = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "min_tokens": 5,
    "logit_bias": {"5": -100},
    "bad_words": ["no"],
    "allowed_token_ids": [1],
}
MASKING = {
    "guided_json": {"type": "object"},
    "structured_outputs": {"regex": "a+"},
    "response_format": {"type": "json_object"},
    "text": {"format": {"type": "json_schema"}},
    "tool_choice": "required",
}
CHANGING = PENALISING | MASKING
NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "typical_p": 1,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "min_tokens": 0,
    "logit_bias": {},
    "bad_words": None,
    "response_format": {"type": "text"},
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
}


@pytest.mark.parametrize("place", PLACES)
def test_the_place_is_named(place: str) -> None:
    with pytest.raises(RowProblem) as problem:
        check_sampling(PLACES[place], raw=False)
    assert str(problem.value).startswith(f"{place} = ")
    assert "--raw-logprobs" in str(problem.value)


ELSEWHERE: list[dict[str, Any]] = [
    {"metadata": {"weather": {"temperature": 21}, "args": {"temperature": 21}, "config": {"top_k": 5}}},
    {"messages": [{"role": "user", "temperature": 21}], "tools": [{"parameters": {"temperature": {}}}]},
    {"body": {"tools": [{"function": {"parameters": {"properties": {"temperature": {}}}}}]}},
    {"judge_params": {"temperature": 0}, "retriever": {"top_k": 5}, "tools_kwargs": {"temperature": 21}},
    {"config": {"retriever": {"top_k": 5}}, "request": "temperature: how high is it?"},
    {"metadata": {"temperature": "22 C", "top_k": "all"}},
    {"config": "configs/temperature.yaml", "sampling": "nucleus", "generation_config": "auto"},
]


@pytest.mark.parametrize("row", ELSEWHERE)
def test_the_same_words_about_something_else_are_taken(row: dict[str, Any]) -> None:
    check_sampling(row, raw=False)


@pytest.mark.parametrize("raw", [True, False])
def test_parameters_that_are_the_text_of_an_object_are_refused(raw: bool) -> None:
    text = "SamplingParams(n=1, temperature=0.7, top_p=0.9)"
    for row in ({"sampling_params": text}, {"metadata": {"sampling_params": text}}):
        with pytest.raises(
            RowProblem, match=r"sampling_params = .* is the text of an object; write .* as JSON"
        ):
            check_sampling(row, raw=raw)


@pytest.mark.parametrize("place", PLACES)
def test_raw_log_probs_are_taken_however_they_were_sampled(place: str) -> None:
    check_sampling(PLACES[place], raw=True)
    check_sampling({**PLACES[place], "logprobs_mode": "raw_logprobs"}, raw=False)


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_the_logits_is_refused(name: str) -> None:
    request = {"body": {name: CHANGING[name]}}
    with pytest.raises(RowProblem, match=rf"body\.{name} = "):
        check_sampling(request, raw=False)
    if name in PENALISING:
        check_sampling(request, raw=True)


@pytest.mark.parametrize("name", MASKING)
def test_structured_decoding_masks_logits_before_any_engine_logs(name: str) -> None:
    with pytest.raises(RowProblem, match=rf"body\.{name} = .*: the engine changes the logits by this before"):
        check_sampling({"body": {name: MASKING[name]}}, raw=True)


@pytest.mark.parametrize("name", CHANGING)
def test_sglang_logs_after_it_has_changed_the_logits_whatever_it_calls_original(name: str) -> None:
    with pytest.raises(RowProblem, match="SGLang changes the logits by this before it logs them"):
        check_sampling({"sampling_params": {name: CHANGING[name]}}, raw=True, engine="sglang")
    check_sampling({"sampling_params": {"temperature": 0.7, "top_p": 0.9}}, raw=True, engine="sglang")


def test_parameters_that_do_nothing_are_taken() -> None:
    check_sampling({**NEUTRAL, "top_k": 0, "body": NEUTRAL, "sampling_params": {"top_k": 2**30}}, raw=False)


@pytest.mark.parametrize("value", ["0.7", True, [1]])
def test_a_parameter_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(RowProblem, match=r"body\.temperature = .* is no number"):
        check_sampling({"body": {"temperature": value}}, raw=True)


def test_a_response_that_is_json_is_no_request() -> None:
    check_sampling({"response": '{"temperature": 20}', "text": '{"top_p": 0.1}'}, raw=False)


def test_the_row_goes_before_the_option() -> None:
    with pytest.raises(RowProblem, match=r"temperature = 0\.7"):
        check_sampling({"temperature": 0.7, "logprobs_mode": "processed_logprobs"}, raw=True)
    with pytest.raises(RowProblem, match="logits are no log-probs"):
        check_sampling({"logprobs_mode": "raw_logits"}, raw=True)


def test_metadata_of_a_scored_file_is_history() -> None:
    row = {"input_ids": [1, 2], "loss_mask": [0, 1], "behavior_logprobs": [0.0, -1.0], "temperature": 1.0}
    scored = json.dumps({"source": "a.jsonl:1", "backend": "hf", "temperature": 0.7})
    assert len(read({**row, "metadata": scored}, with_tokenizer=False)) == 1
    with pytest.raises(RowProblem, match=r"metadata\.temperature = 0\.7"):
        read({**row, "metadata": {"temperature": 0.7}}, with_tokenizer=False)


def score(folder: Path, row: dict[str, Any], *options: str) -> Any:
    data = write_jsonl(folder / "in.jsonl", [row])
    return CliRunner().invoke(
        app, ["score", "--data", str(data), "--output", str(folder / "out.parquet"), *options]
    )


def test_the_command_takes_raw_log_probs_only_with_recorded_ones(tmp_path: Path) -> None:
    row = {**case("vllm_offline"), "sampling_params": {"temperature": 0.6, "top_k": 20}}
    refused = score(tmp_path, row, "--backend", "import")
    assert refused.exit_code == 1
    assert "in.jsonl:1: sampling_params.temperature = 0.6, sampling_params.top_k = 20" in refused.output
    assert score(tmp_path, row, "--backend", "import", "--raw-logprobs").exit_code == 0
    other = score(tmp_path, row, "--backend", "import")
    assert other.exit_code == 1
    assert "--raw-logprobs: True there, False now" in other.output
    wrong = score(tmp_path, row, "--model", "x", "--raw-logprobs")
    assert wrong.exit_code == 1
