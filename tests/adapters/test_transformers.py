"""Hugging Face's Trainer trains with PEAR as the one-rank loss says: accumulation, processes, evaluation, resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron import PearConfig, pear_loss
from pear_megatron.data import DataConfig, TrajectoryDataset, collate, prepare
from tests.adapters.tiny_llama import VOCABULARY, save_tiny_llama
from tests.megatron.runs import write_trajectories

pytest.importorskip("transformers")

REPOSITORY = Path(__file__).parents[2]
ROWS, STEPS, LEARNING_RATE = 8, 3, 1e-3
# Bounds that keep the weights small, so that they do not multiply rounding.
PEAR = PearConfig(variant="token", log_ratio_clip=(-0.05, 0.05), log_weight_clip=(-1.0, 0.7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer in model/, eight rows in data.jsonl and three in heldout.jsonl."""
    root = tmp_path_factory.mktemp("transformers")
    save_tiny_llama(root / "model")
    write_trajectories(root / "data.jsonl", ROWS)
    write_trajectories(root / "heldout.jsonl", 3, seed=1)
    (root / "pear.json").write_text(PEAR.model_dump_json())
    return root


def program(
    folder: Path, output: Path, *options: str, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """The example on some processes; every step sees all rows, whatever their order."""
    start = [sys.executable, "-W", "ignore"]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    settings = {
        "model": folder / "model",
        "data": folder / "data.jsonl",
        "pear": folder / "pear.json",
        "output_dir": output,
        "seq_length": 63,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ROWS // 2 // processes,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
    }
    given = [f"--{name}={value}" for name, value in settings.items()]
    return subprocess.run(
        [*start, "-m", "examples.transformers.sft_pear", *given, *options],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train(folder: Path, output: Path, *options: str, processes: int = 1) -> list[dict[str, float]]:
    """The same -> the Trainer's log: a dict a step, and one of each evaluation."""
    done = program(folder, output, *options, processes=processes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]


def expected(folder: Path, pear: PearConfig = PEAR) -> list[dict[str, float]]:
    """Of every step: loss, gradient norm and report of the one-rank loss on the same model, trained by AdamW."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rows = TrajectoryDataset.open(
        prepare(DataConfig(train=[str(folder / "data.jsonl")], seq_length=63), vocab_size=VOCABULARY)
    )
    batch = collate(rows, [range(ROWS)], int(sum(rows.lengths - 1)))
    steps = []
    for _ in range(STEPS):
        tokens = [torch.as_tensor(rows[i].input_ids[:-1].astype("int64"))[None] for i in range(ROWS)]
        loss, decisions, report = pear_loss(
            torch.cat([model(ids).logits[0] for ids in tokens]), batch.labels.flatten(),
            batch.behavior_logprobs.flatten(), batch.loss_mask.flatten(), batch.cu_seqlens, pear, reward=batch.reward,
        )  # fmt: skip
        optimizer.zero_grad()
        (loss / decisions).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        means = {key: float(total / count) for key, (total, count) in report.items()}
        steps.append({**means, "grad_norm": float(norm)})
    return steps


def assert_same(log: list[dict[str, float]], wanted: list[dict[str, float]], within: float = 1e-4) -> None:
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == len(wanted)
    for step, want in zip(steps, wanted, strict=True):
        assert {name: step[name] for name in want} == pytest.approx(want, rel=within, abs=within / 10)


@pytest.mark.parametrize("processes", [1, 2])
def test_it_trains_as_the_loss_says(folder: Path, tmp_path: Path, processes: int) -> None:
    assert_same(train(folder, tmp_path / "run", processes=processes), expected(folder))


def test_mixed_precision_and_recomputation_stay_within_rounding(folder: Path, tmp_path: Path) -> None:
    log = train(folder, tmp_path / "run", "--bf16", "--gradient_checkpointing")
    kept = (
        "loss",
        "nll",
        "grad_norm",
        "pear/weight",
    )  # shares of decisions at a bound move by whole decisions
    assert_same(log, [{name: step[name] for name in kept} for step in expected(folder)], within=5e-3)


def test_plain_sft_is_the_trainers_own_loss(folder: Path, tmp_path: Path) -> None:
    """On rewards of 1: the model's cross entropy over labels of -100 off the decisions."""
    from transformers import AutoModelForCausalLM

    rows = [json.loads(line) | {"reward": 1.0} for line in (folder / "data.jsonl").read_text().splitlines()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "none.json").write_text('{"variant": "none"}')
    options = [f"--data={tmp_path / 'data.jsonl'}", f"--pear={tmp_path / 'none.json'}"]
    first = train(folder, tmp_path / "run", *options)[0]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    total = decisions = 0.0
    for row in rows:
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["loss_mask"]]).bool()
        total += model(ids, labels=ids.where(mask, -100)).loss.item() * int(mask.sum())
        decisions += int(mask.sum())
    assert first["loss"] == pytest.approx(total / decisions, rel=1e-4)
    assert first["nll"] == pytest.approx(total / decisions, rel=1e-5)


def test_evaluations_are_ratios_of_sums_and_leave_training_as_it_is(folder: Path, tmp_path: Path) -> None:
    heldout = f"--validation_data={folder / 'heldout.jsonl'}"
    options = [heldout, "--eval_strategy=steps", "--eval_steps=1", "--per_device_eval_batch_size=2"]
    log = train(folder, tmp_path / "run", *options)
    assert_same(log, expected(folder))
    evaluations = [entry for entry in log if "eval_nll" in entry]
    assert len(evaluations) == STEPS
    final = _reported(tmp_path / "run", folder / "heldout.jsonl")
    assert evaluations[-1]["eval_nll"] == pytest.approx(final["nll"], rel=1e-5)
    assert evaluations[-1]["eval_pear/weight"] == pytest.approx(final["pear/weight"], rel=1e-4)


def _reported(model: Path, file: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = TrajectoryDataset.open(
        prepare(DataConfig(train=[str(file)], seq_length=63), vocab_size=VOCABULARY)
    )
    batch = collate(rows, [[i] for i in range(len(rows))], 63)
    with torch.no_grad():
        _, _, report = pear_loss(
            trained(batch.tokens, attention_mask=(~batch.padding_mask).long()).logits, batch.labels,
            batch.behavior_logprobs, batch.loss_mask, batch.cu_seqlens, PEAR,
        )  # fmt: skip
    return {key: float(total / count) for key, (total, count) in report.items()}


def test_a_run_resumes_under_its_own_loss_alone(folder: Path, tmp_path: Path) -> None:
    whole = train(folder, tmp_path / "run")
    resumed = train(folder, tmp_path / "run", f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}")
    assert resumed[-2]["loss"] == pytest.approx(whole[-2]["loss"], rel=1e-6)
    (tmp_path / "other.json").write_text(PEAR.model_copy(update={"gamma": 0.9}).model_dump_json())
    other = [
        f"--pear={tmp_path / 'other.json'}",
        f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}",
    ]
    refused = program(folder, tmp_path / "run", *other)
    assert refused.returncode == 1
    assert "was trained with pear {'gamma': 0.999}, this run has {'gamma': 0.9}" in refused.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--label_smoothing_factor=0.1"], "label_smoothing_factor is no part of PEAR's loss"),
        (["--seq_length=20"], "data.jsonl:"),
    ],
)
def test_what_would_train_otherwise_is_refused_in_a_sentence(
    folder: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    done = program(folder, tmp_path / "run", *options)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_processes_that_would_count_alike_are_refused(folder: Path, tmp_path: Path) -> None:
    done = program(folder, tmp_path / "run", "--average_tokens_across_devices=False", processes=2)
    assert done.returncode
    assert "however few decisions it has" in done.stderr
