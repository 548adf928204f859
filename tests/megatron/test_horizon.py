"""A run that goes on with another length trains at the learning rates of the schedule that its recipe names now."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.ranks import SMALL, failures, train_runs
from tests.megatron.runs import Started, metrics, without_times

LR = 1e-3  # of recipes/sft/tiny.yaml


def planned(steps: int, *, warmup: int = 0, lowest: float = 0.0) -> list[float]:
    """lr of each of the steps: linear from 0 to LR, then half a cosine that ends at ``lowest`` after the last."""
    rates = [LR * s / warmup for s in range(warmup)]
    left = steps - warmup
    return rates + [lowest + (LR - lowest) * 0.5 * (1 + math.cos(math.pi * s / left)) for s in range(left)]


def rates(rows: list[dict[str, Any]]) -> list[float]:
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["lr"] for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, trajectories: Path) -> Path:
    """A finished run of eight steps, with a checkpoint after five."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_runs(1, trajectories, {folder: ["train.max_steps=8", "checkpoint.save_interval=5"]})
    return folder


def test_a_finished_run_of_8_steps_goes_on_to_12_at_the_rates_of_a_run_of_12(
    finished: Path, tmp_path: Path, trajectories: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    run = Started(1, f"data.train={trajectories}", f"output_dir={folder}", *SMALL, "train.max_steps=12")
    assert run.wait() == [0], run.output()
    rows = metrics(folder)
    assert rates(rows)[:8] == pytest.approx(planned(8), abs=1e-12)
    assert rates(rows)[8:] == pytest.approx(planned(12)[8:], abs=1e-12)
    assert all(row["lr"] > 0 for row in rows)
    assert f"resuming from {folder}/checkpoints/iter_0000008" in run.output()
    assert (
        "re-planned from step 9 on: lr_decay_steps 12 (was 8); the next step has lr 0.00025" in run.output()
    )


@pytest.mark.parametrize(("steps", "extra"), [(12, []), (6, []), (12, ["optimizer.lr_decay_steps=20"])])
def test_an_interrupted_run_goes_on_by_the_schedule_of_its_new_length(
    finished: Path, tmp_path: Path, trajectories: Path, steps: int, extra: list[str]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "iter_0000008")
    train_runs(1, trajectories, {folder: [f"train.max_steps={steps}", *extra]})
    horizon = 20 if extra else steps
    assert rates(metrics(folder)) == pytest.approx(planned(8)[:5] + planned(horizon)[5:steps], abs=1e-12)


def test_a_schedule_planned_beyond_the_run_is_the_same_when_the_run_is_extended(
    tmp_path: Path, trajectories: Path
) -> None:
    extended, straight = tmp_path / "extended", tmp_path / "straight"
    schedule = ["optimizer.lr_decay_steps=6", "optimizer.lr_warmup_steps=2", "optimizer.min_lr=1e-5"]
    train_runs(1, trajectories, {extended: ["train.max_steps=3", *schedule]})
    rows = train_runs(
        1, trajectories, {run: ["train.max_steps=7", *schedule] for run in (extended, straight)}
    )
    assert without_times(rows[extended]) == without_times(rows[straight])
    assert rates(rows[straight]) == pytest.approx([*planned(6, warmup=2, lowest=1e-5), 1e-5], abs=1e-12)


def test_steps_after_the_schedule_at_rate_0_are_refused(tmp_path: Path, trajectories: Path) -> None:
    (message,) = failures(
        1, trajectories, tmp_path / "run", "train.max_steps=9", "optimizer.lr_decay_steps=5"
    )
    assert "optimizer.lr_decay_steps 5 is less than the run's 9 steps and optimizer.min_lr is 0" in message
    assert "from step 6 on nothing would be trained" in message


def test_another_rate_is_another_run(finished: Path, trajectories: Path) -> None:
    (message,) = failures(1, trajectories, finished, "train.max_steps=12", "optimizer.lr=1e-4")
    assert "other settings: optimizer.lr " in message
    assert "checkpoint.pretrained starts from this run's weights" in message
