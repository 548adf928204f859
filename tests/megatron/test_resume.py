"""Runs can be repeated, stopped, killed and continued, on the same or another layout, without a trace."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron.train.stop import EXIT_REQUEUE
from tests.distributed import run_ranks
from tests.megatron.ranks import SMALL, be_quiet, failures, final_weights, train_runs
from tests.megatron.runs import Started, metrics, torchrun, train, without_times, write_trajectories
from tests.megatron.test_layouts import DISTRIBUTED, PP, TP, VPP, assert_same_run

ASYNC = "checkpoint.async_save=true"


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def interrupted_copy(folder: Path, copy: Path, step: int) -> Path:
    """A run of four or six steps as a process killed after ``step`` leaves it, mid-line in metrics.jsonl."""
    shutil.copytree(folder, copy)
    checkpoints = sorted((copy / "checkpoints").glob("iter_*"))
    shutil.rmtree(checkpoints[-1])
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


@pytest.mark.slow
def test_resumes_on_any_other_layout(tmp_path: Path, trajectories: Path) -> None:
    """TP, PP, interleaved PP and DP change between the second and the third step, with both optimizers."""
    saving = ["checkpoint.save_interval=2"]
    first = {
        1: {"one": [], "one-distributed": [DISTRIBUTED]},
        2: {"TP2": [TP], "PP2xVPP2": [PP, VPP], "DP2": [DISTRIBUTED], "async": [DISTRIBUTED, ASYNC]},
        4: {"TP2xPP2": [TP, PP, DISTRIBUTED]},
    }  # fmt: skip
    begun: dict[str, Path] = {}
    for world, runs in first.items():
        folders = {tmp_path / name: [*saving, *extra] for name, extra in runs.items()}
        train_runs(world, trajectories, folders)
        begun |= {folder.name: folder for folder in folders}
    reference = metrics(begun["one"])

    then: dict[int, dict[str, tuple[str, list[str]]]] = {
        1: {"TP2 to TP1": ("TP2", []), "DP2 to DP1": ("DP2", [DISTRIBUTED]), "interleaved to one": ("PP2xVPP2", [])},
        2: {
            "one to TP2": ("one", [TP]),
            "TP2xPP2 to interleaved": ("TP2xPP2", [PP, VPP, DISTRIBUTED]),
            "DP2 in the background to TP2": ("async", [TP, DISTRIBUTED]),
            "DP1 to DP2": ("one-distributed", [DISTRIBUTED]),
        },
    }  # fmt: skip
    for world, runs2 in then.items():
        copies = {
            interrupted_copy(begun[name], tmp_path / case, 2): extra for case, (name, extra) in runs2.items()
        }
        for rows in train_runs(world, trajectories, copies).values():
            assert_same_run(rows, reference, relative=1e-5)


def test_finished_run_is_left_alone(trajectories: Path, one_rank_folder: Path) -> None:
    before = (one_rank_folder / "metrics.jsonl").read_bytes()
    run = Started(1, f"data.train={trajectories}", f"output_dir={one_rank_folder}", "train.max_steps=6")
    assert run.wait() == [0]
    assert "nothing to do" in run.output()
    assert (one_rank_folder / "metrics.jsonl").read_bytes() == before
    shorter = Started(1, f"data.train={trajectories}", f"output_dir={one_rank_folder}", "train.max_steps=3")
    assert shorter.wait() == [0]
    said = shorter.output()
    assert f"nothing to do: {one_rank_folder} is at step 6 already, and this command asks for 3" in said
    assert "re-planned" not in said
    assert "steps 6 to 3" not in said


def test_another_recipe_does_not_continue_a_run(trajectories: Path, one_rank_folder: Path) -> None:
    run = Started(
        1,
        f"data.train={trajectories}",
        f"output_dir={one_rank_folder}",
        "train.max_steps=9",
        "pear.variant=sequence",
    )
    assert run.wait() == [1]
    assert "other settings: pear.variant " in run.output()
    assert "choose another output_dir" in run.output()
    assert len(metrics(one_rank_folder)) == 6


def test_other_data_under_the_same_name_do_not_continue_a_run(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl", count=12)
    run = tmp_path / "run"
    train_runs(1, data, {run: ["train.max_steps=2"]})
    write_trajectories(data, count=12, seed=5)
    (message,) = failures(1, data, run, "train.max_steps=4")
    assert "its batches follow from data.train (fingerprint " in message
    assert "put back what was there" in message


def test_an_optimizer_of_another_kind_is_refused_by_name(tmp_path: Path, trajectories: Path) -> None:
    run = tmp_path / "run"
    train_runs(1, trajectories, {run: ["train.max_steps=2"]})
    (message,) = failures(1, trajectories, run, DISTRIBUTED)
    assert "was written with parallel.use_distributed_optimizer false" in message


def test_starts_from_a_pretrained_checkpoint(
    tmp_path: Path, trajectories: Path, one_rank_folder: Path, one_rank: list[dict[str, Any]]
) -> None:
    run = train(tmp_path / "run", trajectories, 1, f"checkpoint.pretrained={one_rank_folder}", "seed=7")
    assert run[0]["step"] == 1
    assert run[0]["nll"] < one_rank[0]["nll"]


def rank_random_numbers(rank: int, root: Path) -> tuple[list[float], list[float]]:
    """What this rank's generators give after saving, and after being set back by loading."""
    import numpy as np

    from pear_megatron.megatron.checkpoint import state as checkpoint
    from pear_megatron.megatron.checkpoint.saver import save_model
    from pear_megatron.megatron.layout import initialize
    from pear_megatron.megatron.model import build_model
    from pear_megatron.recipe import ParallelConfig, TrainConfig
    from tests.megatron.test_forward_step import MODEL

    be_quiet()
    train_config = TrainConfig(precision="fp32", global_batch_size=2)
    layout = initialize(MODEL, ParallelConfig(), train_config)
    model = build_model(MODEL, layout, train_config)

    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(rank)
    path = save_model(root, 1, layout, model)
    after_saving = draw()
    checkpoint.load(path, model, layout=layout)
    return after_saving, draw()


def test_every_rank_gets_its_random_states_back(tmp_path: Path) -> None:
    first, second = run_ranks(2, rank_random_numbers, tmp_path)
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0] != second[0]


def send_at_step(folder: Path, run: Started, step: int, number: signal.Signals, rank: int) -> None:
    wait_until(lambda: len(metrics(folder)) >= step or run.ranks[0].exitcode is not None)
    run.send(number, rank)


@pytest.mark.parametrize(
    ("number", "processes", "rank", "extra"),
    [
        (signal.SIGTERM, 1, 0, []),
        (signal.SIGUSR1, 2, 1, [DISTRIBUTED, ASYNC]),
    ],
    ids=["SIGTERM", "SIGUSR1-to-the-second-of-two-ranks"],
)
def test_asked_to_stop_saves_asks_to_be_requeued_and_goes_on(
    tmp_path: Path, trajectories: Path, number: signal.Signals, processes: int, rank: int, extra: list[str]
) -> None:
    arguments = [f"data.train={trajectories}", *SMALL, *extra, "train.max_steps=20"]
    folder, straight = tmp_path / "run", tmp_path / "straight"
    stopped = Started(processes, *arguments, f"output_dir={folder}")
    send_at_step(folder, stopped, 3, number, rank)
    assert stopped.wait() == [EXIT_REQUEUE] * processes, stopped.output()
    assert "and saved; the same command goes on: " in stopped.output()
    at = metrics(folder)[-1]["step"]
    assert 3 <= at < 20
    assert (folder / "requeue").read_text() == f"stopped at step {at} of 20\n"
    assert [path.name for path in (folder / "checkpoints").glob("iter_*")] == [f"iter_{at:07d}"]

    again = Started(processes, *arguments, f"output_dir={folder}")
    assert again.wait() == [0] * processes
    assert not (folder / "requeue").exists()
    reference = Started(processes, *arguments, f"output_dir={straight}")
    assert reference.wait() == [0] * processes
    assert without_times(metrics(folder)) == without_times(metrics(straight))


def test_a_failing_run_does_not_ask_to_be_requeued(tmp_path: Path, trajectories: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "requeue").write_text("stopped at step 3 of 30\n")  # of the attempt before
    run = Started(
        1, f"data.train={trajectories}", f"output_dir={folder}", *SMALL, "optimizer.lr=1e30", "optimizer.clip_grad=0"
    )  # fmt: skip
    assert run.wait() == [1]
    assert not (folder / "requeue").exists()


@pytest.mark.slow
def test_through_torchrun_the_requeue_file_speaks(tmp_path: Path, trajectories: Path) -> None:
    """SIGTERM to torchrun reaches every process; its exit code says nothing, the file does."""
    folder = tmp_path / "run"
    arguments = [f"data.train={trajectories}", f"output_dir={folder}", *SMALL, "train.max_steps=500"]
    run = torchrun(2, *arguments)
    try:
        wait_until(lambda: len(metrics(folder)) >= 3)
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    at = metrics(folder)[-1]["step"]
    assert at < 500
    assert run.returncode == 1, errors
    assert (folder / "requeue").read_text() == f"stopped at step {at} of 500\n"
    assert (folder / "checkpoints" / f"iter_{at:07d}" / "files.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_killed_at_ten_random_moments_ends_like_an_uninterrupted_run(
    tmp_path: Path, trajectories: Path, background: bool
) -> None:
    """SIGKILL to both ranks, between steps, in them and in the midst of saving; their writers live on."""
    arguments = [
        f"data.train={trajectories}", *SMALL, DISTRIBUTED, "train.max_steps=30", "checkpoint.save_interval=2",
        f"checkpoint.async_save={background}", "checkpoint.keep_last=2",
    ]  # fmt: skip
    folder, straight = tmp_path / "run", tmp_path / "straight"
    rng = random.Random(f"kill {background}")
    checkpoints = folder / "checkpoints"
    kills = in_a_save = 0
    while kills < 10:
        run = Started(2, *arguments, f"output_dir={folder}")
        begun, awaited = len(metrics(folder)), rng.randint(1, 2)

        def due(begun: int = begun, awaited: int = awaited, run: Started = run) -> bool:
            steps = [row["step"] for row in metrics(folder)]
            return run.ranks[0].exitcode is not None or (
                bool(steps) and steps[-1] >= min(begun, 28) + awaited
            )

        wait_until(due)
        if rng.random() < 0.5:  # in the middle of the next save, if there is one
            wait_until(lambda run=run: any(checkpoints.glob(".iter_*")) or run.ranks[0].exitcode is not None)
        time.sleep(rng.random() * 0.03)
        in_a_save += any(checkpoints.glob(".iter_*.partial-*"))
        assert run.ranks[0].exitcode is None, f"it ended before the kills did:\n{run.output()}"
        run.kill()
        assert run.wait() == [-signal.SIGKILL] * 2
        kills += 1
    assert in_a_save >= 2
    last = Started(2, *arguments, f"output_dir={folder}")
    assert last.wait() == [0, 0], last.output()
    reference = Started(2, *arguments, f"output_dir={straight}")
    assert reference.wait() == [0, 0], reference.output()

    assert without_times(metrics(folder)) == without_times(metrics(straight))
    mine, theirs = final_weights(folder, straight)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "iter_0000028",
        "iter_0000030",
        "latest_checkpointed_iteration.txt",
    ]
