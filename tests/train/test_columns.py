"""Runs whose loss reads more of the data than log-probs: refused without them, and alike on every layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron.ranks import failures, train_runs


def with_columns(source: Path, target: Path, *, topk: bool = True, reference: bool = True) -> Path:
    """The rows with a top-k (the sampled token and two neighbours) and with reference_logprobs, 0.1 lower."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in source.read_text().splitlines()]
    for row in rows:
        ids, mask, logprobs = row["input_ids"], row["loss_mask"], row["behavior_logprobs"]
        if topk:
            row["behavior_topk_ids"] = [
                [(i + 1) % 1000, i, (i + 7) % 1000] if m else None for i, m in zip(ids, mask, strict=True)
            ]
            row["behavior_topk_logprobs"] = [
                [-0.7, v, -1.6] if m else None for v, m in zip(logprobs, mask, strict=True)
            ]
        if reference:
            row["reference_logprobs"] = [v - 0.1 if m else None for v, m in zip(logprobs, mask, strict=True)]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def assert_alike(rows: list[dict[str, Any]], expected: list[dict[str, Any]], *keys: str) -> None:
    for row, other in zip(rows, expected, strict=True):
        mine, theirs = ({key: found[key] for key in keys if key in found} for found in (row, other))
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("pear.base_loss=kl", "missing field 'behavior_topk_ids'"),
        ("pear.ratio=reference", "missing field 'reference_logprobs'"),
    ],
)
def test_data_without_the_column_are_refused_on_every_rank_before_there_is_a_model(
    setting: str, said: str, tmp_path: Path, data: dict[str, Path]
) -> None:
    for message in failures(2, data["near"], tmp_path / "run", setting):
        assert f"{data['near']}:1: {said}" in message
        assert "`pear-megatron score --" in message
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["data_cache"]


def test_held_out_data_must_have_the_reference_where_training_has_it(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    train = with_columns(data["near"], tmp_path / "train.jsonl")
    held_out = f"data.validation={data['held_out']}"
    (message,) = failures(1, train, tmp_path / "run", "pear.negative_floor=1", held_out)
    assert "data.validation: the rows have no reference_logprobs and those of data.train have it" in message


def test_ratios_are_taken_against_the_reference_on_every_layout(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    train = with_columns(data["near"], tmp_path / "train.jsonl", topk=False)
    reference = ["pear.ratio=reference", f"data.validation={train}"]
    one = train_runs(1, train, {tmp_path / "behavior": [], tmp_path / "one": reference})
    two = train_runs(
        2,
        train,
        {tmp_path / "tp": [*reference, "parallel.tensor_model_parallel_size=2"], tmp_path / "dp": reference},
    )
    against_behavior, against_reference = one[tmp_path / "behavior"], one[tmp_path / "one"]
    steps = [row for row in against_reference if "loss" in row]
    # Step 1 is of the same model: the ratios differ by what the columns differ by.
    moved = steps[0]["pear/log_ratio"] - against_behavior[0]["pear/log_ratio"]
    assert moved == pytest.approx(0.1, abs=1e-4)
    for rows in two.values():
        assert_alike(
            rows,
            against_reference,
            "loss",
            "nll",
            "pear/log_ratio",
            "pear/weight",
            "validation/pear/log_ratio",
        )


def test_a_kl_is_the_same_on_every_layout_and_in_evaluations(tmp_path: Path, data: dict[str, Path]) -> None:
    train = with_columns(data["near"], tmp_path / "train.jsonl", reference=False)
    held_out = with_columns(data["held_out"], tmp_path / "held_out.jsonl", reference=False)
    kl = ["pear.base_loss=kl", "pear.variant=none", f"data.validation={held_out}", "optimizer.lr=1e-2"]
    one = train_runs(1, train, {tmp_path / "one": kl})[tmp_path / "one"]
    layouts = {
        "tp": ["parallel.tensor_model_parallel_size=2"],
        "dp": [],
        "pp": ["parallel.pipeline_model_parallel_size=2"],
    }
    runs = train_runs(2, train, {tmp_path / name: [*kl, *layout] for name, layout in layouts.items()})
    # A fresh model is near uniform: ln 1000 less the entropy of the three entries of a decision.
    q = torch.tensor([-0.7, -1.6, -7.0]).softmax(0)
    assert one[0]["validation/kl"] == pytest.approx(math.log(1000) + float((q * q.log()).sum()), abs=0.02)
    steps = [row for row in one if "kl" in row]
    assert len(steps) == 4
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    for rows in runs.values():
        assert_alike(rows, one, "loss", "kl", "nll", "validation/kl", "validation/loss")
