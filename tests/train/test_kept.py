"""What a run keeps beside its newest checkpoints: the best one, exports, profiles; through kills too."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.megatron.ranks import SMALL, train_runs
from tests.megatron.runs import Started, metrics, without_times
from tests.megatron.test_layouts import DISTRIBUTED, PP, TP
from tests.megatron.test_resume import wait_until

METRIC = "validation/nll"
BEST = f"checkpoint.keep_best={METRIC}"
EACH_STEP = ["train.eval_interval=1", "checkpoint.save_interval=1", "checkpoint.keep_last=1"]
# Held-out NLL falls, and then rises as the model learns the training data by heart.
OVERFITS = [
    "optimizer.lr=3e-2",
    "optimizer.lr_decay_style=constant",
    "optimizer.clip_grad=0",
    "pear.variant=none",
]


def validating(data: dict[str, Path]) -> list[str]:
    return [f"data.validation={data['held_out']}", *EACH_STEP, *OVERFITS]


def best_of(folder: Path) -> int:
    rows = [row for row in metrics(folder) if row["step"] > 0]
    return min(rows, key=lambda row: row[METRIC])["step"]


def link_of(folder: Path) -> str:
    return os.readlink(folder / "checkpoints" / "best")


@pytest.mark.parametrize("extra", [[], ["checkpoint.async_save=true"]], ids=["sync", "async"])
def test_the_best_checkpoint_stays(tmp_path: Path, data: dict[str, Path], extra: list[str]) -> None:
    folder = tmp_path / "run"
    train_runs(1, data["near"], {folder: [*validating(data), BEST, *extra, "train.max_steps=6"]})
    best = best_of(folder)
    assert best < 5, "the last one is the best: nothing is tested"
    assert link_of(folder) == f"iter_{best:07d}"
    there = sorted(path.name for path in (folder / "checkpoints").glob("iter_*"))
    assert there == [f"iter_{best:07d}", "iter_0000006"]


def test_it_is_that_of_an_uninterrupted_run_and_is_exported(tmp_path: Path, data: dict[str, Path]) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    own = [*validating(data), BEST, "optimizer.lr_decay_steps=6"]
    runs = {straight: [*own, "train.max_steps=6"], resumed: [*own, "train.max_steps=3"]}
    train_runs(1, data["near"], runs)
    train_runs(1, data["near"], {resumed: [*own, "train.max_steps=6"]})
    assert link_of(resumed) == link_of(straight)
    assert [row[METRIC] for row in metrics(resumed)] == [row[METRIC] for row in metrics(straight)]
    one = _exported(resumed / "checkpoints" / "best", tmp_path / "a")
    other = _exported(straight / "checkpoints" / "best", tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in other)


def _exported(checkpoint: Path, output: Path) -> dict[str, torch.Tensor]:
    from pear_megatron.megatron.checkpoint.export import export_checkpoint

    export_checkpoint(checkpoint, output)
    return load_exported(output)


def load_exported(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that the index of a Hugging Face folder names."""
    assert (folder / "config.json").is_file()
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: t for file in set(names.values()) for name, t in load_file(folder / file).items()}
    assert tensors.keys() == names.keys()
    return tensors


def test_a_best_checkpoint_that_is_gone_is_said(tmp_path: Path, data: dict[str, Path]) -> None:
    folder = tmp_path / "run"
    own = [f"data.train={data['near']}", f"output_dir={folder}", *SMALL, *validating(data), BEST]
    assert Started(1, *own, "train.max_steps=3", "optimizer.lr_decay_steps=6").wait() == [0]
    shutil.rmtree((folder / "checkpoints" / "best").resolve())
    if not list((folder / "checkpoints").glob("iter_*")):
        pytest.skip("the best one was the last one")
    run = Started(1, *own, "train.max_steps=4", "optimizer.lr_decay_steps=6")
    assert run.wait() == [0]
    assert "is not there any more; the next evaluation is the best one" in run.output()
    assert link_of(folder) == "iter_0000004"


def test_exports_are_those_of_their_checkpoints_on_every_layout(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    own = [
        "checkpoint.save_interval=1",
        "checkpoint.export_interval=2",
        "checkpoint.keep_last=1",
        "train.max_steps=3",
    ]
    layouts = {1: {"one": []}, 2: {"TP2": [TP], "PP2-async": [PP, "checkpoint.async_save=true", DISTRIBUTED]}}
    exported = {}
    for world, runs in layouts.items():
        folders = {tmp_path / name: [*own, *extra] for name, extra in runs.items()}
        train_runs(world, data["near"], folders)
        for folder in folders:
            found = sorted(os.listdir(folder / "exports"))
            assert found == ["step_2", "step_3"]  # and the end, whatever the interval is
            exported[folder.name] = [load_exported(folder / "exports" / name) for name in found]
            last = _exported(folder, tmp_path / f"{folder.name}-by-command")
            assert all(torch.equal(exported[folder.name][1][name], t) for name, t in last.items())
    for name in ("TP2", "PP2-async"):
        for mine, one in zip(exported[name], exported["one"], strict=True):
            for key, tensor in one.items():
                torch.testing.assert_close(mine[key], tensor, rtol=1e-5, atol=1e-5)
    moved = exported["one"]
    assert any(not torch.equal(moved[0][name], moved[1][name]) for name in moved[0])


def test_an_export_that_a_kill_prevented_is_made_up_for(tmp_path: Path, data: dict[str, Path]) -> None:
    folder = tmp_path / "run"
    own = ["checkpoint.save_interval=1", "checkpoint.export_interval=2", "train.max_steps=2"]
    train_runs(1, data["near"], {folder: own})
    whole = load_exported(folder / "exports" / "step_2")
    os.replace(folder / "exports" / "step_2", folder / "exports" / ".step_2.partial")
    train_runs(1, data["near"], {folder: own})  # there is nothing else to do
    assert os.listdir(folder / "exports") == ["step_2"]
    again = load_exported(folder / "exports" / "step_2")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_killed_at_random_it_ends_like_an_uninterrupted_run(tmp_path: Path, data: dict[str, Path]) -> None:
    folder, straight = tmp_path / "run", tmp_path / "straight"
    own = [f"data.train={data['near']}", *SMALL, *validating(data), BEST, "checkpoint.async_save=true"]
    own += ["checkpoint.export_interval=2", "train.max_steps=8"]
    rng = random.Random(0)
    for target in (1, 2, 3, 4, 5, 6, 7):
        run = Started(1, *own, f"output_dir={folder}")
        wait_until(lambda: len(metrics(folder)) > target or run.ranks[0].exitcode is not None)  # noqa: B023
        time.sleep(rng.uniform(0, 0.15))
        run.kill()
        run.wait(10)
        for export in (folder / "exports").glob("step_*"):
            load_exported(export)  # whole, if it is there
        if (folder / "checkpoints" / "best").is_symlink():
            assert (folder / "checkpoints" / "best" / "files.json").is_file()
    assert Started(1, *own, f"output_dir={folder}").wait() == [0]
    assert Started(1, *own, f"output_dir={straight}").wait() == [0]
    rows = [without_times(metrics(path)) for path in (folder, straight)]
    for part in rows:
        for row in part:
            row.pop("validation/seconds", None)
    assert rows[0] == rows[1]
    assert link_of(folder) == link_of(straight)
    assert sorted(os.listdir(folder / "exports")) == sorted(os.listdir(straight / "exports"))
    for export in (straight / "exports").iterdir():
        mine, expected = load_exported(folder / "exports" / export.name), load_exported(export)
        assert all(torch.equal(mine[name], tensor) for name, tensor in expected.items())


def test_a_profile_has_the_steps_that_were_asked_for(tmp_path: Path, data: dict[str, Path]) -> None:
    folder, plain = tmp_path / "run", tmp_path / "plain"
    rows = train_runs(
        2, data["near"], {folder: [TP, "train.profile={start:2,stop:3,ranks:[1]}"], plain: [TP]}
    )
    assert without_times(rows[folder]) == without_times(rows[plain])
    assert os.listdir(folder / "profile") == ["rank1_steps_2-3.json"]
    events = json.loads((folder / "profile" / "rank1_steps_2-3.json").read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert {"step 2", "step 3"} <= names
    assert not {"step 1", "step 4"} & names
    assert any("pear_weights" in name for name in names)


def test_the_best_on_other_held_out_data_is_not_the_best(tmp_path: Path, data: dict[str, Path]) -> None:
    folder = tmp_path / "run"
    train_runs(1, data["near"], {folder: [*validating(data), BEST, "train.max_steps=4"]})
    other = [*EACH_STEP, *OVERFITS, BEST, "train.max_steps=6", f"data.validation={data['far']}"]
    train_runs(1, data["near"], {folder: other})
    rows = [row for row in metrics(folder) if row["step"] > 4]
    assert link_of(folder) == f"iter_{min(rows, key=lambda row: row[METRIC])['step']:07d}"
