"""What a comparison writes, said before it begins, and what a finished cell lets go of.

Once a cell is done its numbers are in small files. Of its models, export/ (after the offline phase) and rl/final (after
RL) stay, for whoever goes on with them; those of tuning do not. Checkpoints, with their optimizers' states, and the
prepared data are there to continue a stopped cell, and nothing reads them again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pear_megatron.compare import stages
from pear_megatron.compare.cell import Cell
from pear_megatron.errors import RecipeError
from pear_megatron.plan.disk import count_checkpoints, run_disk
from pear_megatron.plan.parameters import model_parameters
from pear_megatron.storage import remove, show_bytes

_TO_CONTINUE = (f"{stages.RUN}/checkpoints", f"{stages.RUN}/data_cache", f"{stages.RL}/checkpoints")
_MODELS = (stages.EXPORT, f"{stages.RL}/final")
# TRL trains float32 weights, whatever it computes in; AdamW has two moments.
_RL_WEIGHT, _RL_OPTIMIZER = 4, 8


@dataclass(frozen=True)
class CellDisk:
    """Bytes of models and checkpoints in a cell's folder: while it runs, at most, and once it is done."""

    most: int
    kept: int


def cell_disk(cell: Cell) -> CellDisk:
    """By formula; the prepared data and logs are not counted, and of an unknown number of checkpoints one is."""
    offline, checkpointing = cell.offline, cell.rl.checkpointing
    parameters = model_parameters(offline.model)
    run = run_disk(offline, offline.train.max_steps)
    runs_kept, runs_most = (
        (count or 1) * run.checkpoint if cell.has_offline_phase else 0 for count in (run.kept, run.most)
    )
    from_megatron = cell.has_offline_phase or offline.checkpoint.pretrained is not None
    export = run.export if from_megatron else 0
    final, of_rl = _RL_WEIGHT * parameters, (_RL_WEIGHT + _RL_OPTIMIZER) * parameters
    rl_kept, rl_most = (
        (count or 1) * of_rl
        for count in count_checkpoints(
            checkpointing.save_period, checkpointing.keep_last, cell.rl.grpo.max_num_steps
        )
    )
    everything = runs_kept + export + rl_kept + final
    models = export + final if cell.evaluated else 0
    return CellDisk(
        most=max(runs_most, runs_kept + export + rl_most, everything),
        kept=everything if cell.recipe.keep == "all" else models,
    )


def check_disk(cells: Sequence[Cell], root: Path, jobs: int) -> str:
    """What the cells, ``jobs`` at once, will write into ``root``, for people; RecipeError if there is no room."""
    sizes = [cell_disk(cell) for cell in cells]
    kept = sum(size.kept for size in sizes)
    passing = sum(sorted((size.most - size.kept for size in sizes), reverse=True)[:jobs])
    there = sum(bytes_in(cell.folder) for cell in cells)
    free = shutil.disk_usage(root).free
    said = (
        f"{len(cells)} cell(s) to run, {min(jobs, len(cells))} at once, take up to {show_bytes(kept + passing)} in "
        f"{root} and keep {show_bytes(kept)} (models and checkpoints; prepared data not counted)"
    )
    if kept + passing - there > free:
        raise RecipeError(
            f"{said}; {show_bytes(there)} of that are there and {show_bytes(free)} are free: make room, put "
            "output_dir on another disk, or run fewer cells at once with --jobs"
        )
    return f"{said}; {show_bytes(free)} are free"


def drop(cell: Cell) -> int:
    """Removes what nothing reads again of a cell that is done -> bytes that were freed."""
    if cell.recipe.keep == "all":
        return 0
    folders = [cell.folder / name for name in (*_TO_CONTINUE, *(() if cell.evaluated else _MODELS))]
    freed = sum(map(bytes_in, folders))
    for folder in folders:
        remove(folder)
    return freed


def bytes_in(folder: Path) -> int:
    """Of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
