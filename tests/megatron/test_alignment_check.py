"""Training refuses log-probs that belong to other tokens, before its first step, and leaves no trace otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pear_megatron.alignment import Alignment
from tests.megatron.ranks import failures, train_runs
from tests.megatron.runs import launch, metrics
from tests.megatron.test_output_chunks import needs_output_processor
from tests.structured import VOCAB_SIZE, make_rows, write_rows

MODEL = [f"model.vocab_size={VOCAB_SIZE}", "train.global_batch_size=16"]
FOUR_RANKS = {
    "TP2xDP2": ["parallel.tensor_model_parallel_size=2"],
    "TP2xPP2xVPP2": [
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2",
    ],
}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("structured") / "aligned.jsonl", make_rows(40, seed=1))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, aligned: Path) -> Path:
    """A run that has learnt a little of what the data are like."""
    folder = tmp_path_factory.mktemp("policy") / "run"
    few_steps = ["train.max_steps=25", "optimizer.lr=1e-2", "pear.variant=none"]
    train_runs(1, aligned, {folder: [*MODEL, *few_steps]})
    return folder


def shifted(folder: Path, shift: int) -> Path:
    return write_rows(folder / f"shift{shift}.jsonl", make_rows(40, seed=1, shift=shift))


@pytest.mark.parametrize(("shift", "said"), [(1, "1 token after"), (-2, "2 tokens before")])
def test_shifted_log_probs_are_refused_on_every_rank(
    tmp_path: Path, policy: Path, shift: int, said: str
) -> None:
    data = shifted(tmp_path, shift)
    layout = FOUR_RANKS["TP2xDP2"] if shift == 1 else FOUR_RANKS["TP2xPP2xVPP2"]
    pretrained = f"checkpoint.pretrained={policy}"
    messages = failures(4, data, tmp_path / "run", *MODEL, *layout, pretrained)
    assert len(messages) == 4
    for message in messages:
        assert message.startswith("DataError: 1 problem in the data")
        assert f"behavior_logprobs seem to stand {said} the ones they belong to" in message
        assert str(data) in message
        assert "row-" in message
        assert "train.check_alignment=false" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@needs_output_processor
def test_shifted_log_probs_are_refused_by_chunks_of_the_output_layer_too(
    tmp_path: Path, policy: Path, aligned: Path
) -> None:
    chunks = [*MODEL, f"checkpoint.pretrained={policy}", "train.output_chunk_tokens=50"]
    for message in failures(2, shifted(tmp_path, 1), tmp_path / "run", *chunks):
        assert "behavior_logprobs seem to stand 1 token after the ones they belong to" in message
    train_runs(1, aligned, {tmp_path / "aligned": [*chunks, "train.max_steps=1"]})


def test_aligned_data_pass_and_so_does_who_knows_better(tmp_path: Path, policy: Path, aligned: Path) -> None:
    pretrained = f"checkpoint.pretrained={policy}"
    train_runs(1, aligned, {tmp_path / "aligned": [*MODEL, pretrained]})
    forced = [
        [*MODEL, pretrained, "train.check_alignment=false"],
        [*MODEL, pretrained, "pear.variant=none"],
    ]
    train_runs(1, shifted(tmp_path, 1), {tmp_path / f"forced{i}": run for i, run in enumerate(forced)})


def test_fresh_weights_are_never_refused(tmp_path: Path, aligned: Path) -> None:
    runs = {tmp_path / f"run{seed}": [*MODEL, f"seed={seed}", "train.max_steps=1"] for seed in range(3)}
    train_runs(1, aligned, runs)


def test_log_probs_of_other_text_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    from pear_megatron.train.alignment_check import _say

    def look(correlation: float, decisions: int) -> str:
        caplog.clear()
        correlations = {shift: correlation if shift == 0 else 0.0 for shift in range(-8, 9)}
        with caplog.at_level("INFO", "pear_megatron"):
            _say(
                Alignment(decisions, correlations, shift=0, spread_ratio=1.0),
                "path/to/model",
                "behavior_logprobs",
            )
        return f"{caplog.records[0].levelname} {caplog.text}"

    assert look(0.02, 5000).startswith("WARNING")
    assert "nothing to do with the log-probs of path/to/model (correlation 0.02" in look(0.02, 5000)
    assert look(0.8, 5000).startswith("INFO")
    assert "no shift found" in look(0.8, 5000)
    assert look(0.02, 50).startswith("INFO")
    assert "too few to tell a shift" in look(0.8, 50)


def test_a_reference_that_is_another_model_is_warned_of(tmp_path: Path, policy: Path) -> None:
    """Also where nothing but the reference is read: dft_policy=reference without ratios."""
    rows = make_rows(40, seed=1)
    for row in rows:
        row["reference_logprobs"] = [None if x is None else x - 0.5 for x in row["behavior_logprobs"]]
    data = write_rows(tmp_path / "reference.jsonl", rows)
    run = ["pear.variant=none", "pear.dft_power=1", "pear.dft_policy=reference", "train.max_steps=1"]
    small = ["model.num_layers=4", "model.hidden_size=32", "model.ffn_hidden_size=64"]
    done = launch(
        1,
        f"data.train={data}",
        f"output_dir={tmp_path / 'run'}",
        *small,
        *MODEL,
        f"checkpoint.pretrained={policy}",
        *run,
    )
    assert f"reference_logprobs differ from the log-probs of {policy} by" in done.stderr
    assert "reference_logprobs and the model's correlate by" in done.stderr


def test_the_check_changes_no_bit_of_a_run(tmp_path: Path, policy: Path, aligned: Path) -> None:
    pretrained = f"checkpoint.pretrained={policy}"
    layout = [
        *FOUR_RANKS["TP2xDP2"],
        "parallel.use_distributed_optimizer=true",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ]
    recompute = ["train.recompute_granularity=full", "train.recompute_method=uniform"]
    recompute.append("train.recompute_num_layers=1")
    with_check, without = tmp_path / "with", tmp_path / "without"
    common = [*MODEL, *layout, *recompute, pretrained]
    train_runs(4, aligned, {with_check: common, without: [*common, "train.check_alignment=false"]})
    rows = [
        [{k: v for k, v in row.items() if k not in ("tokens_per_second", "step_seconds")} for row in run]
        for run in (metrics(with_check), metrics(without))
    ]
    assert rows[0] == rows[1]


def test_a_resumed_run_is_not_checked_again(tmp_path: Path, policy: Path) -> None:
    """Its weights are no longer those that the check is about."""
    data, folder = shifted(tmp_path, 1), tmp_path / "run"
    forced = [*MODEL, f"checkpoint.pretrained={policy}", "train.check_alignment=false"]
    train_runs(1, data, {folder: [*forced, "train.max_steps=2"]})
    train_runs(1, data, {folder: [*MODEL, f"checkpoint.pretrained={policy}", "train.max_steps=3"]})
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3]


def test_the_command_says_it_in_one_message_with_exit_code_one(tmp_path: Path, policy: Path) -> None:
    data = shifted(tmp_path, 2)
    small = [
        "model.num_layers=4", "model.hidden_size=32", "model.ffn_hidden_size=64",
        f"checkpoint.pretrained={policy}", *MODEL,
    ]  # fmt: skip
    done = launch(1, f"data.train={data}", f"output_dir={tmp_path / 'run'}", *small, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "2 tokens after the ones they belong to" in done.stderr


@pytest.mark.parametrize("change", ["other_words", "other_template"])
def test_another_tokenizer_or_chat_template_is_refused(tmp_path: Path, change: str) -> None:
    from pear_megatron.data import load_tokenizer, tokenizer_hash
    from tests.byte_tokenizer import save_byte_tokenizer

    ours = save_byte_tokenizer(tmp_path / "ours")
    theirs = save_byte_tokenizer(tmp_path / "theirs", **{change: True})
    rows = make_rows(8)
    for row in rows:
        row["tokenizer_hash"] = tokenizer_hash(load_tokenizer(str(theirs)))
    data = write_rows(tmp_path / "data.jsonl", rows)
    (message,) = failures(1, data, tmp_path / "run", *MODEL, f"data.tokenizer={ours}", "model.vocab_size=300")
    assert f"{data}:1: tokenizer_hash" in message
    assert "a foreign tokenizer, chat_template or chat_template_kwargs made these token ids" in message
    assert json.dumps(str(ours))[1:-1] in message
