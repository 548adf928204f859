"""Checkpoints appear whole or not at all, and nothing takes the last whole one away."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron.errors import CheckpointError
from pear_megatron.megatron.checkpoint.paths import damage, latest_step, whole_steps
from tests.distributed import run_ranks
from tests.megatron.ranks import SMALL, be_quiet, failures, train_runs
from tests.megatron.runs import Started, metrics, run_entry_point, without_times
from tests.megatron.test_layouts import DISTRIBUTED, TP

LATEST = "latest_checkpointed_iteration.txt"


def make_whole(root: Path, step: int) -> Path:
    """A folder with the files of a checkpoint and their sizes; nothing that could be loaded."""
    folder = root / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    for name in ("metadata.json", ".metadata", "__0_0.distcp", "__1_0.distcp"):
        (folder / name).write_bytes(b"x" * 100)
    sizes = {path.name: 100 for path in folder.iterdir()}
    (folder / "files.json").write_text(json.dumps(sizes))
    (root / LATEST).write_text(str(step))
    return folder


def cut(path: Path) -> None:
    os.truncate(path, 60)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("__1_0.distcp", cut, "__1_0.distcp has 60 of 100 bytes"),
        ("__0_0.distcp", remove, "__0_0.distcp is missing"),
        (".metadata", remove, ".metadata is missing"),
        ("metadata.json", remove, "metadata.json is missing"),
        ("files.json", cut, "files.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_by_name_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: Any, said: str
) -> None:
    make_whole(tmp_path, 10)
    make_whole(tmp_path, 20)
    how(make_whole(tmp_path, 30) / name)
    with caplog.at_level(logging.WARNING, logger="pear_megatron"):
        assert latest_step(tmp_path) == 20
    assert "skipping a damaged checkpoint" in caplog.text
    assert f"iter_0000030 ({said}" in caplog.text


@pytest.mark.parametrize("tracker", [None, "", "release\x00", "40"])
def test_without_a_good_tracker_the_newest_whole_checkpoint_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tracker: str | None
) -> None:
    make_whole(tmp_path, 10)
    make_whole(tmp_path, 20)
    if tracker is None:
        (tmp_path / LATEST).unlink()
    else:
        (tmp_path / LATEST).write_text(tracker)
    with caplog.at_level(logging.WARNING, logger="pear_megatron"):
        assert latest_step(tmp_path) == 20
    assert LATEST in caplog.text


def test_the_tracker_may_point_back(tmp_path: Path) -> None:
    make_whole(tmp_path, 10)
    make_whole(tmp_path, 20)
    (tmp_path / LATEST).write_text("10")
    assert whole_steps(tmp_path) == [10, 20]


def test_no_checkpoint_is_a_new_run_and_only_damaged_ones_an_error(tmp_path: Path) -> None:
    assert latest_step(tmp_path / "nowhere") is None
    assert latest_step(tmp_path) is None
    (make_whole(tmp_path, 10) / ".metadata").unlink()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint under .* is whole: .*iter_0000010 \(\.metadata is"
    ):
        latest_step(tmp_path)
    shutil.rmtree(tmp_path / "iter_0000010")
    with pytest.raises(CheckpointError, match="none is there"):
        latest_step(tmp_path)


def test_a_checkpoint_of_another_program_needs_no_sizes(tmp_path: Path) -> None:
    (make_whole(tmp_path, 10) / "files.json").unlink()
    assert latest_step(tmp_path) == 10


def test_a_run_leaves_whole_checkpoints_and_nothing_else(one_rank_folder: Path) -> None:
    root = one_rank_folder / "checkpoints"
    assert (root / LATEST).read_text() == "6"
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000003", "iter_0000006", LATEST]
    for step in (3, 6):
        files = json.loads((root / f"iter_000000{step}" / "files.json").read_text())
        assert any(name.endswith(".distcp") for name in files)
        assert damage(root / f"iter_000000{step}") is None


def test_damage_that_sizes_do_not_show_is_skipped_when_loading_fails(
    tmp_path: Path, trajectories: Path
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    train_runs(1, trajectories, {straight: ["checkpoint.save_interval=1", "checkpoint.keep_last=null"]})
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / "iter_0000004")
    for shards in (run / "checkpoints" / "iter_0000003").glob("*.distcp"):
        shards.write_bytes(b"\0" * shards.stat().st_size)
    rows = train_runs(1, trajectories, {run: []})[run]
    assert without_times(rows) == without_times(metrics(straight))


def test_saving_in_the_background_changes_no_bit(tmp_path: Path, trajectories: Path) -> None:
    every = ["checkpoint.save_interval=1", "checkpoint.keep_last=null", TP, DISTRIBUTED]
    runs = train_runs(
        2,
        trajectories,
        {
            tmp_path / "sync": [*every, "checkpoint.async_save=false"],
            tmp_path / "async": [*every, "checkpoint.async_save=true"],
        },
    )
    first, second = (without_times(rows) for rows in runs.values())
    assert first == second
    steps = [f"checkpoints/iter_{step:07d}" for step in (1, 2, 3)]  # written while training went on
    sync, background = (run_ranks(1, rank_tensors, [folder / step for step in steps])[0] for folder in runs)
    for theirs, mine in zip(sync, background, strict=True):
        assert any("exp_avg" in name for name in theirs)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def rank_tensors(rank: int, folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    from pear_megatron.megatron import cpu

    cpu.enable()
    be_quiet()
    from megatron.core import dist_checkpointing

    loaded = [dist_checkpointing.load_plain_tensors(str(folder)) for folder in folders]
    return [{name: x for name, x in one.items() if isinstance(x, torch.Tensor)} for one in loaded]


def test_keep_last_keeps_the_newest_and_counts_only_whole_ones(tmp_path: Path, trajectories: Path) -> None:
    run = tmp_path / "run"
    root = run / "checkpoints"
    keep = ["checkpoint.save_interval=1", "checkpoint.keep_last=2"]
    train_runs(1, trajectories, {run: ["train.max_steps=3", *keep]})
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    next((root / "iter_0000003").glob("*.distcp")).unlink()
    train_runs(1, trajectories, {run: ["train.max_steps=4", "checkpoint.keep_last=2"]})
    # Step 3 is damaged: run 2 goes on from step 2, and step 4 and step 2 are the last two whole ones.
    assert damage(root / "iter_0000004") is None
    assert damage(root / "iter_0000002") is None


def test_checkpoints_that_are_too_many_are_named_before_they_go(tmp_path: Path, trajectories: Path) -> None:
    run = tmp_path / "run"
    root = run / "checkpoints"
    every = ["checkpoint.save_interval=1", "checkpoint.keep_last=null"]
    train_runs(1, trajectories, {run: ["train.max_steps=4", *every]})
    assert len(list(root.glob("iter_*"))) == 4
    goes_on = Started(1, f"data.train={trajectories}", f"output_dir={run}", *SMALL, "train.max_steps=5")
    assert goes_on.wait() == [0], goes_on.output()
    assert (
        f"checkpoint.keep_last is 2 and {root} holds 4 checkpoints: the older ones (steps 1, 2)"
        in goes_on.output()
    )
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000004", "iter_0000005"]


def rank_fails_while_writing(rank: int, root: Path, where: str) -> tuple[str, list[str]]:
    """Saves step 1, then step 2 with a limit on the size of files -> the error, and what is in the folder."""
    from pear_megatron.megatron.checkpoint.saver import CheckpointSaver, save_model
    from pear_megatron.megatron.layout import initialize
    from pear_megatron.megatron.model import build_model
    from pear_megatron.recipe import ParallelConfig, TrainConfig
    from tests.megatron.test_forward_step import MODEL

    be_quiet()
    train_config = TrainConfig(precision="fp32", global_batch_size=2)
    layout = initialize(MODEL, ParallelConfig(tensor_model_parallel_size=2), train_config)
    model = build_model(MODEL, layout, train_config)
    save_model(root, 1, layout, model)
    saver = CheckpointSaver(root, layout, asynchronous=True)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    error = ""
    try:
        if where == "shards of rank 1" and rank == 1:
            limit(4096)
        saver.save(2, model, None, None)
        if where == "the index on rank 0" and rank == 0:  # the writers have been forked already
            limit(512)
        saver.finish()
    except CheckpointError as raised:
        error = str(raised)
    limit(resource.RLIM_INFINITY)
    torch.distributed.barrier()
    return error, sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("where", ["shards of rank 1", "the index on rank 0"])
def test_an_error_on_one_rank_while_writing_is_everybodys_and_leaves_the_last_one(
    tmp_path: Path, where: str
) -> None:
    for error, left in run_ranks(2, rank_fails_while_writing, tmp_path, where):
        assert "the checkpoint of step 2 cannot be written to" in error
        assert "that of step 1 is whole" in error
        assert left == ["iter_0000001", LATEST]
    assert damage(tmp_path / "iter_0000001") is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB that holds nothing yet."""
    mount = tmp_path / "disk"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", mount], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_stops_the_run_before_it_writes_and_keeps_the_last_checkpoint(
    small_disk: Path, tmp_path: Path, trajectories: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(small_disk)
    said = failures(2, trajectories, run, "checkpoint.save_interval=1")  # one checkpoint takes 2 MB
    for message in said:
        assert "the checkpoint of step 2 cannot be written to" in message
        assert "GB are free; make room" in message
        assert "that of step 1 is whole" in message
    assert whole_steps(run / "checkpoints") == [1]
    assert sorted(path.name for path in small_disk.iterdir()) == ["iter_0000001", LATEST]
    assert len(metrics(run)) == 2


def test_a_disk_that_fills_up_while_writing_leaves_nothing_half_written(
    small_disk: Path, tmp_path: Path
) -> None:
    errors = run_ranks(2, rank_fills_the_disk, small_disk)
    for error in errors:
        assert "cannot be written" in error
        assert "with 0 GB free" in error
        assert "there is none before it" in error
    assert list(small_disk.iterdir()) == [small_disk / "ballast"]


def rank_fills_the_disk(rank: int, root: Path) -> str:
    """The room is there when the save begins and gone when the shards are written."""
    from pear_megatron.megatron.checkpoint.saver import CheckpointSaver
    from pear_megatron.megatron.layout import initialize
    from pear_megatron.megatron.model import build_model
    from pear_megatron.recipe import ParallelConfig, TrainConfig
    from tests.megatron.test_forward_step import MODEL

    be_quiet()
    train_config = TrainConfig(precision="fp32", global_batch_size=2)
    layout = initialize(MODEL, ParallelConfig(tensor_model_parallel_size=2), train_config)
    model = build_model(MODEL, layout, train_config)
    saver = CheckpointSaver(root, layout)
    make_room = saver.folder.make_room

    def make_room_and_lose_it(step: int, size: int) -> str:
        folder = make_room(step, size)
        free = shutil.disk_usage(root).free
        (root / "ballast").write_bytes(b"x" * (free - 40_000))
        return folder

    saver.folder.make_room = make_room_and_lose_it  # type: ignore[method-assign]
    try:
        saver.save(2, model, None, None)
    except CheckpointError as raised:
        return str(raised)
    return ""


def test_a_folder_that_cannot_be_written_stops_the_run_before_its_first_step(
    tmp_path: Path, trajectories: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to("/sys/kernel")  # takes no files, even from root
    for message in failures(2, trajectories, run):
        assert f"checkpoints cannot be written to {run}/checkpoints" in message
    assert metrics(run) == []


def run_without_room_for_small_files(rank: int, *arguments: Any) -> None:
    """The entry point; once it has found room for a save, rank 0 cannot write 1000 bytes into a file."""
    from pear_megatron.megatron.checkpoint.folder import CheckpointFolder

    make_room = CheckpointFolder.make_room

    def make_room_and_lose_it(self: CheckpointFolder, step: int, size: int) -> str:
        folder = make_room(self, step, size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return folder

    CheckpointFolder.make_room = make_room_and_lose_it  # type: ignore[method-assign]
    run_entry_point(rank, *arguments)


def test_an_error_on_rank_0_before_the_shards_does_not_hang_the_others(
    tmp_path: Path, trajectories: Path
) -> None:
    arguments = [f"data.train={trajectories}", f"output_dir={tmp_path / 'run'}", *SMALL]
    run = Started(2, *arguments, TP, target=run_without_room_for_small_files)
    assert run.wait() == [1, 1]
    assert "error: the checkpoint of step " in run.output()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_what_a_killed_run_left_half_written_goes_with_the_next_start(
    tmp_path: Path, trajectories: Path
) -> None:
    half = tmp_path / "run" / "checkpoints" / ".iter_0000002.partial-12ab34cd"
    half.mkdir(parents=True)
    (half / "__0_0.distcp").write_bytes(b"x")
    train_runs(1, trajectories, {tmp_path / "run": []})
    assert not half.exists()


def test_a_save_that_fails_ends_the_command_with_one_line(
    small_disk: Path, tmp_path: Path, trajectories: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(small_disk)
    run = Started(
        1, f"data.train={trajectories}", f"output_dir={tmp_path / 'run'}", *SMALL, "model.hidden_size=256"
    )
    assert run.wait() == [1]
    assert "Traceback" not in run.output()
    assert "error: the checkpoint of step 4 cannot be written to" in run.output()
    assert not (tmp_path / "run" / "requeue").exists()


def test_a_checkpoint_of_other_versions_says_which_wrote_it() -> None:
    from pear_megatron.megatron.checkpoint.state import _other_versions, versions

    assert _other_versions({"versions": versions()}) == _other_versions({}) == ""
    said = _other_versions({"versions": versions() | {"megatron-core": "0.99.0"}})
    assert said.startswith("; it was written with megatron-core 0.99.0, torch ")
