"""Checkpoints of a run on disk: which are whole, which is next to resume from, and how one is loaded.

checkpoints/iter_0000020/                      one checkpoint, whole or not there (saver.py writes them)
checkpoints/iter_0000020/files.json            its files and their sizes: how a truncated one is told
checkpoints/latest_checkpointed_iteration.txt  Megatron's name for the one to resume from

They are mcore's ``torch_dist`` checkpoints: any TP x PP x DP layout can load them.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from pear_megatron.errors import CheckpointError
from pear_megatron.megatron.checkpoint import rng
from pear_megatron.megatron.layout import Layout
from pear_megatron.megatron.model import as_chunks, unwrap
from pear_megatron.megatron.optimizer import load_optimizer, prepare_to_load

log = logging.getLogger("pear_megatron")

LATEST = "latest_checkpointed_iteration.txt"
FILES = "files.json"
# The distributed optimizer's shards can then be loaded on another data-parallel size.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def checkpoint_path(root: Path, step: int) -> Path:
    """Folder of a step's checkpoint, named as Megatron names it."""
    return root / f"iter_{step:07d}"


def steps_on_disk(root: Path) -> list[int]:
    """Steps of the checkpoint folders under ``root``, whole or not, newest first."""
    if not root.is_dir():
        return []
    found = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in root.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def damage(path: Path) -> str | None:
    """What is missing from a checkpoint folder; None if it is whole.

    A checkpoint that another program wrote has no files.json: it is whole if its metadata are there.
    """
    for name in ("metadata.json", ".metadata"):
        if not (path / name).is_file():
            return f"{name} is missing"
    if not (path / FILES).is_file():
        return None
    try:
        sizes = json.loads((path / FILES).read_text())
    except ValueError as error:
        return f"{FILES} cannot be read ({error})"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def _tracked_step(root: Path) -> int | None:
    """The step that Megatron's tracker file names; None, with a warning, if it names no whole checkpoint."""
    tracker, steps = root / LATEST, steps_on_disk(root)
    if not tracker.is_file():
        if steps:
            log.warning("%s is missing; looking at the checkpoints themselves", tracker)
        return None
    text = tracker.read_text(errors="replace").strip()
    if not text.isdigit():
        log.warning("%s holds %r, not a step; looking at the checkpoints themselves", tracker, text)
    elif int(text) not in steps:
        log.warning("%s names step %s, which is not there", tracker, text)
    elif damage(checkpoint_path(root, int(text))) is None:
        return int(text)
    return None


def whole_steps(root: Path) -> list[int]:
    """Steps that a run can resume from, best first: the tracker's, then the newest ones.

    Warns of every damaged checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints, or a tracker that names one, and none is whole.
    """
    tracked, steps = _tracked_step(root), steps_on_disk(root)
    whole, damaged = ([tracked] if tracked is not None else []), []
    for step in steps:
        if step == tracked:
            continue
        problem = damage(checkpoint_path(root, step))
        if problem is None:
            whole.append(step)
        elif tracked is None or step > tracked:
            damaged.append(f"{checkpoint_path(root, step)} ({problem})")
    for description in damaged:
        log.warning("skipping a damaged checkpoint: %s", description)
    if not whole and (damaged or (root / LATEST).is_file()):
        raise CheckpointError(
            f"no checkpoint under {root} is whole: {'; '.join(damaged) or 'none is there'}; put one back, or "
            "remove that folder to start anew"
        )
    return whole


def latest_step(root: Path) -> int | None:
    """Step to resume from (see whole_steps); None if there is no checkpoint."""
    return next(iter(whole_steps(root)), None)


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that ``path`` names: itself, or the newest one of a run or of its checkpoints.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    for root in (path, path / "checkpoints"):
        if (root / "metadata.json").is_file():
            if problem := damage(root):
                raise CheckpointError(f"{root} is damaged: {problem}")
            return root
        if (step := latest_step(root)) is not None:
            return checkpoint_path(root, step)
    raise CheckpointError(
        f"no checkpoint at {path}: expected a folder with metadata.json, or one with {LATEST} in it"
    )


def model_state(model: Any) -> dict[str, Any]:
    """The sharded tensors of a model, or of a stage's chunks, as Megatron arranges them."""
    chunks = as_chunks(model)
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {name: unwrap(chunk).sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}


def read_common(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: step, data, layout, scheduler.

    Raises:
        CheckpointError: it cannot be read.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException  # not an Exception

    try:
        return dist_checkpointing.load_common_state_dict(str(path))
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load(
    path: Path, model: Any, optimizer: Any = None, scheduler: Any = None, layout: Layout | None = None
) -> int:
    """Loads a checkpoint into a model on any layout, and into what a run resumes with, where given.

    Args:
        path: the checkpoint's folder.
        model: a model, wrapped or not, or a list of chunks.
        optimizer, scheduler: of the run to resume.
        layout: of the run to resume: random states are restored if it is the one that was saved.

    Returns:
        The step the checkpoint was written at; 0 if another program wrote it.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException  # not an Exception

    state = model_state(model)
    models = list(state)
    if optimizer is not None:
        prepare_to_load(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=True, metadata=SHARDING)
    if layout is not None and read_common(path).get("layout") == rng.describe(layout):
        state["rng"] = rng.sharded_state(layout)
    try:
        loaded = dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{path} cannot be loaded into this model: {error}") from error
    for name, chunk in zip(models, as_chunks(model), strict=True):
        unwrap(chunk).load_state_dict(loaded[name])
    if optimizer is not None:
        load_optimizer(optimizer, loaded["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in state:
        rng.restore(loaded["rng"])
    return int(loaded.get("step", 0))  # another program's checkpoint has none
