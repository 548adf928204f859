"""What plan says of the disk is what a real run and its export write."""

from __future__ import annotations

from pathlib import Path

import pytest

from pear_megatron.plan.disk import count_checkpoints, run_disk
from pear_megatron.recipe import load_recipe
from tests.megatron.runs import TINY, launch, write_trajectories


def bytes_of(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


@pytest.mark.parametrize(
    ("precision", "distributed", "tp"),
    [("fp32", False, 1), ("fp32", True, 2), ("bf16", False, 2), ("bf16", True, 1)],
)
def test_checkpoints_and_export_take_what_was_said(
    tmp_path: Path, precision: str, distributed: bool, tp: int
) -> None:
    from pear_megatron.megatron.checkpoint.export import export_checkpoint

    run = tmp_path / "run"
    overrides = [
        f"data.train={write_trajectories(tmp_path / 'data.jsonl')}",
        f"output_dir={run}",
        f"train.precision={precision}",
        f"parallel.use_distributed_optimizer={distributed}",
        f"parallel.tensor_model_parallel_size={tp}",
        "model.hidden_size=256",  # large enough that the files' own heads do not count
        "train.max_steps=3",
        "checkpoint.save_interval=1",
        "checkpoint.keep_last=2",
    ]
    launch(tp, *overrides)
    disk = run_disk(load_recipe(TINY, overrides), 3)
    found = sorted((run / "checkpoints").glob("iter_*"))
    assert len(found) == disk.kept == 2
    assert disk.most == 3
    for checkpoint in found:
        assert bytes_of(checkpoint) == pytest.approx(disk.checkpoint, rel=0.02)
    export_checkpoint(run, tmp_path / "export")
    assert bytes_of(tmp_path / "export", "*.safetensors") == pytest.approx(disk.export, rel=0.02)


@pytest.mark.parametrize(
    ("interval", "keep_last", "steps", "expected"),
    [
        (None, None, None, (1, 1)),  # one at the end
        (10, None, 25, (3, 3)),  # at 10, 20 and the end
        (10, 2, 25, (2, 3)),  # a new one is whole before an old one goes
        (10, 4, 25, (3, 3)),
        (10, 2, None, (2, 3)),
        (10, None, None, (None, None)),
    ],
)
def test_checkpoints_are_counted(
    interval: int | None, keep_last: int | None, steps: int | None, expected: tuple[int | None, int | None]
) -> None:
    assert count_checkpoints(interval, keep_last, steps) == expected


def test_the_best_checkpoint_and_exports_are_counted() -> None:
    own = ["data.train=x.jsonl", "data.validation=y.jsonl", "output_dir=z", "checkpoint.save_interval=5"]
    own += ["checkpoint.keep_best=validation/nll", "checkpoint.export_interval=10", "train.eval_interval=5"]
    disk = run_disk(load_recipe(TINY, own), 25)
    assert (disk.kept, disk.most, disk.exports) == (3, 4, 3)
    disk = run_disk(load_recipe(TINY, [*own, "checkpoint.keep_last=null"]), None)
    assert (disk.kept, disk.most, disk.exports) == (None, None, None)
