"""Checkpoints of a run, through mcore's dist_checkpointing: any TP x PP layout can load them.

checkpoints/iter_0000020/                      one checkpoint, whole or not there
checkpoints/latest_checkpointed_iteration.txt  Megatron's name for the newest one
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from pear_megatron.errors import PearError
from pear_megatron.megatron.layout import Layout
from pear_megatron.megatron.model import unwrap

LATEST = "latest_checkpointed_iteration.txt"


class CheckpointError(PearError, RuntimeError):
    """A checkpoint that cannot be written or read."""


def checkpoint_path(root: Path, step: int) -> Path:
    """Folder of a step's checkpoint, named as Megatron names it."""
    return root / f"iter_{step:07d}"


def latest_step(root: Path) -> int | None:
    """Step of the newest whole checkpoint under ``root``; None if there is none.

    Raises:
        CheckpointError: the tracker names a checkpoint that is not there.
    """
    tracker = root / LATEST
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(f"{tracker} holds {text!r}, expected a step number; remove it to start anew")
    if not (checkpoint_path(root, int(text)) / "metadata.json").is_file():
        raise CheckpointError(
            f"{tracker} names step {text}, but {checkpoint_path(root, int(text))} is not a whole checkpoint; "
            "write the step of another one into the tracker, or remove it to start anew"
        )
    return int(text)


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that ``path`` names: itself, or the newest one of a run or of its checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for root in (path, path / "checkpoints"):
        if (root / "metadata.json").is_file():
            return root
        if (step := latest_step(root)) is not None:
            return checkpoint_path(root, step)
    raise CheckpointError(
        f"no checkpoint at {path}: expected a folder with metadata.json, or one with {LATEST} in it"
    )


def _state(model: Any, optimizer: Any, scheduler: Any, *, loading: bool) -> dict[str, Any]:
    model_state = unwrap(model).sharded_state_dict()
    state: dict[str, Any] = {"model": model_state}
    if optimizer is not None:
        # The distributed optimizer's shards can be loaded on another data-parallel size.
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)
        state["scheduler"] = scheduler.state_dict()
    return state


def save(root: Path, step: int, layout: Layout, model: Any, optimizer: Any, scheduler: Any) -> Path:
    """Writes a checkpoint: into a folder of another name first, so that it appears whole or not at all.

    Raises:
        CheckpointError: the folder cannot be written; earlier checkpoints are untouched.
    """
    from megatron.core import dist_checkpointing

    final, partial = checkpoint_path(root, step), root / f".iter_{step:07d}.partial"
    problem: list[str | None] = [None]
    if layout.is_main:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            problem = [f"cannot write a checkpoint to {root}: {error}"]
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise CheckpointError(problem[0])

    state = _state(model, optimizer, scheduler, loading=False) | {"step": step}
    dist_checkpointing.save(state, str(partial))
    torch.distributed.barrier()
    if layout.is_main:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        tracker = root / f".{LATEST}.partial"
        tracker.write_text(str(step))
        os.replace(tracker, root / LATEST)
    torch.distributed.barrier()
    return final


def load(path: Path, model: Any, optimizer: Any = None, scheduler: Any = None) -> int:
    """Loads a checkpoint into a model on any layout, and into its optimizer and scheduler where given.

    Returns:
        The step the checkpoint was written at.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """
    from megatron.core import dist_checkpointing

    state = _state(model, optimizer, scheduler, loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(path))
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded into this model: {error}") from error
    unwrap(model).load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        scheduler.load_state_dict(loaded["scheduler"])
    return int(loaded["step"])
