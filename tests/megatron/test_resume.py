"""Runs can be repeated, interrupted and continued without a trace."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.megatron.runs import TINY, launch, metrics, train


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "tokens_per_second")} for row in rows]


def interrupted_copy(folder: Path, copy: Path, step: int) -> Path:
    """The run as a process killed after ``step`` leaves it, a half-written metrics line included."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "iter_0000006")
    (copy / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[: step + 1]) + lines[step + 1][:20])
    return copy


def test_same_command_twice_gives_bit_identical_metrics(
    tmp_path: Path, trajectories: Path, one_rank: list[dict[str, Any]]
) -> None:
    assert without_times(train(tmp_path / "again", trajectories, 1)) == without_times(one_rank)


def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, trajectories: Path, one_rank_folder: Path, one_rank: list[dict[str, Any]]
) -> None:
    folder = interrupted_copy(one_rank_folder, tmp_path / "run", 3)
    resumed = train(folder, trajectories, 1, "checkpoint.save_interval=3")
    assert without_times(resumed) == without_times(one_rank)


def test_resumes_on_another_layout(
    tmp_path: Path, trajectories: Path, one_rank_folder: Path, one_rank: list[dict[str, Any]]
) -> None:
    from tests.megatron.test_layouts import TP, assert_same_run

    folder = interrupted_copy(one_rank_folder, tmp_path / "run", 3)
    assert_same_run(train(folder, trajectories, 2, TP), one_rank, relative=1e-5)


def test_finished_run_is_left_alone(trajectories: Path, one_rank_folder: Path) -> None:
    before = (one_rank_folder / "metrics.jsonl").read_bytes()
    done = launch(1, f"data.train={trajectories}", f"output_dir={one_rank_folder}", "train.max_steps=6")
    assert "nothing to do" in done.stderr
    assert (one_rank_folder / "metrics.jsonl").read_bytes() == before


def test_another_recipe_does_not_continue_a_run(trajectories: Path, one_rank_folder: Path) -> None:
    done = launch(
        1,
        f"data.train={trajectories}",
        f"output_dir={one_rank_folder}",
        "train.max_steps=9",
        "pear.variant=sequence",
        check=False,
    )
    assert done.returncode != 0
    assert "pear.variant differ" in done.stderr
    assert "choose another output_dir" in done.stderr
    assert len(metrics(one_rank_folder)) == 6


def test_checkpoints_appear_whole_or_not_at_all(one_rank_folder: Path) -> None:
    root = one_rank_folder / "checkpoints"
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert sorted(path.name for path in root.iterdir()) == [
        "iter_0000003",
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
    ]


def test_starts_from_a_pretrained_checkpoint(
    tmp_path: Path, trajectories: Path, one_rank_folder: Path, one_rank: list[dict[str, Any]]
) -> None:
    run = train(tmp_path / "run", trajectories, 1, f"checkpoint.pretrained={one_rank_folder}", "seed=7")
    assert run[0]["step"] == 1
    assert run[0]["nll"] < one_rank[0]["nll"]


def test_sigusr1_asks_for_a_checkpoint_and_training_goes_on(tmp_path: Path, trajectories: Path) -> None:
    folder = tmp_path / "run"
    overrides = [f"data.train={trajectories}", f"output_dir={folder}", "train.max_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pear_megatron.train", "--config", str(TINY), *overrides],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 1)
        process.send_signal(signal.SIGUSR1)
        tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
        wait_until(tracker.exists)
        saved = int(tracker.read_text())
        wait_until(lambda: metrics(folder)[-1]["step"] > saved)
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
