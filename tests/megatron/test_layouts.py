"""The same run on every layout gives the one-process answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron.runs import train

TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
TIMES = {"tokens_per_second"}


def assert_same_run(run: list[dict[str, Any]], reference: list[dict[str, Any]], relative: float) -> None:
    assert [row["step"] for row in run] == [row["step"] for row in reference]
    for row, expected in zip(run, reference, strict=True):
        assert row.keys() == expected.keys()
        for key in expected.keys() - TIMES:
            assert row[key] == pytest.approx(expected[key], rel=relative, abs=1e-7), (row["step"], key)


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (2, [TP]),
        (2, [PP]),
        (2, []),
        (2, ["parallel.use_distributed_optimizer=true"]),
        (4, [TP, PP]),
    ],
    ids=["TP2", "PP2", "DP2", "DP2-distributed-optimizer", "TP2xPP2"],
)
def test_every_layout_trains_like_one_process(
    tmp_path: Path, trajectories: Path, one_rank: list[dict[str, Any]], processes: int, overrides: list[str]
) -> None:
    assert_same_run(train(tmp_path / "run", trajectories, processes, *overrides), one_rank, relative=1e-5)


def test_micro_batch_size_changes_nothing(
    tmp_path: Path, trajectories: Path, one_rank: list[dict[str, Any]]
) -> None:
    assert_same_run(train(tmp_path / "run", trajectories, 1, "train.micro_batch_size=8"), one_rank, 1e-5)


def test_bf16_with_tied_embeddings_follows_float32_on_every_layout(
    tmp_path: Path, trajectories: Path
) -> None:
    tied = ["model.share_embeddings_and_output_weights=true", "model.add_qkv_bias=true"]
    reference = train(tmp_path / "fp32", trajectories, 1, *tied)
    run = train(tmp_path / "bf16", trajectories, 2, *tied, PP, "train.precision=bf16")
    assert_same_run(
        [{k: row[k] for k in ("step", "loss", "nll", "grad_norm")} for row in run],
        [{k: row[k] for k in ("step", "loss", "nll", "grad_norm")} for row in reference],
        relative=2e-2,
    )
