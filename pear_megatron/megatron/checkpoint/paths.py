"""Checkpoints of a run on disk: which are whole, and which is next to resume from.

checkpoints/iter_0000020/                      one checkpoint, whole or not there (saver.py writes them)
checkpoints/iter_0000020/files.json            its files and their sizes: how a truncated one is told
checkpoints/latest_checkpointed_iteration.txt  Megatron's name for the one to resume from
checkpoints/best                               a link to the best one, where checkpoint.keep_best asks for it

They are mcore's ``torch_dist`` checkpoints: any TP x PP x DP layout can load them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

from pear_megatron.errors import CheckpointError
from pear_megatron.storage import is_name, write_atomically

log = logging.getLogger("pear_megatron")

LATEST = "latest_checkpointed_iteration.txt"
BEST = "best"
FILES = "files.json"


def checkpoint_path(root: Path, step: int) -> Path:
    """Folder of a step's checkpoint, named as Megatron names it."""
    return root / f"iter_{step:07d}"


def steps_on_disk(root: Path) -> list[int]:
    """Steps of the checkpoint folders under ``root``, whole or not, newest first."""
    if not root.is_dir():
        return []
    found = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in root.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def best_step(root: Path) -> int | None:
    """Step of the checkpoint that the link to the best one names; None without a link."""
    link = root / BEST
    found = re.fullmatch(r"iter_(\d{7,})", os.readlink(link)) if link.is_symlink() else None
    return int(found[1]) if found else None


def damage(path: Path) -> str | None:
    """What is missing from a checkpoint folder; None if it is whole.

    A checkpoint that another program wrote has no files.json: it is whole if its metadata are there.
    """
    for name in ("metadata.json", ".metadata"):
        if not (path / name).is_file():
            return f"{name} is missing"
    return damaged_file(path)


def write_sizes(path: Path) -> None:
    """Writes down the sizes of a checkpoint's files, when all are there."""
    sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.name != FILES}
    write_atomically(path / FILES, json.dumps(sizes, indent=1))


def damaged_file(path: Path) -> str | None:
    """The first file that has not the size that was written down; None if all have, or nothing was."""
    if not (path / FILES).is_file():
        return None
    try:
        sizes = dict(json.loads((path / FILES).read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        return f"{FILES} cannot be read ({error})"
    for name, size in sizes.items():
        file = path / name
        if not is_name(name) or not file.is_file():
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
    text = tracker.read_text(errors="replace", encoding="utf-8").strip()
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
