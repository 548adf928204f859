"""CheckpointFolder: what rank 0 does to the folder of a run's checkpoints; each step of it can be the last one."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from pear_megatron.errors import CheckpointError
from pear_megatron.megatron.checkpoint.background import write_format
from pear_megatron.megatron.checkpoint.paths import (
    BEST,
    LATEST,
    best_step,
    checkpoint_path,
    damage,
    steps_on_disk,
    write_sizes,
)
from pear_megatron.storage import remove, sync

log = logging.getLogger("pear_megatron")

_PASSING = (".partial-", ".removed-")


class CheckpointFolder:
    """The folder ``root``, in which ``keep_last`` checkpoints stay (None = all), and the best one.

    A process that dies between two lines here leaves whole checkpoints under their names and the rest
    under names that ``tidy`` removes.
    """

    def __init__(self, root: Path, keep_last: int | None) -> None:
        self.root, self.keep_last = root, keep_last

    def tidy(self) -> None:
        """Makes the folder, tries whether it takes files, and clears what an interrupted run left."""
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.root) as file:
            file.write(b"\0" * 4096)
        for path in self.root.iterdir():
            if path.name.startswith(".iter_") and any(word in path.name for word in _PASSING):
                remove(path)

    def surplus(self, step: int) -> list[int]:
        """Steps, up to this one, of whole checkpoints that are more than ``keep_last``, newest first."""
        if self.keep_last is None:
            return []
        steps = [
            s for s in steps_on_disk(self.root) if s <= step and not damage(checkpoint_path(self.root, s))
        ]
        best = best_step(self.root)
        return [s for s in steps[self.keep_last :] if s != best]

    def make_room(self, step: int, size: int) -> str:
        """A new folder of a passing name for a checkpoint of that many bytes.

        Raises:
            CheckpointError: they do not fit on the disk.
        """
        free = shutil.disk_usage(self.root).free
        needed = int(size * 1.02) + (1 << 20)
        if free < needed:
            raise CheckpointError(
                f"it takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free; make room, lower "
                f"checkpoint.keep_last, or put output_dir on another disk; {self._last_good()}"
            )
        # A name of its own: a process of a killed run may still be writing into the folder of the last attempt.
        folder = self._passing(step, "partial")
        folder.mkdir()
        return str(folder)

    def _passing(self, step: int, word: str) -> Path:
        return self.root / f".iter_{step:07d}.{word}-{uuid.uuid4().hex[:8]}"

    def point_to_best(self, step: int | None) -> None:
        """Has the link ``best`` name a step's checkpoint; None = removes it. OSError if the disk takes no links."""
        if step is None:
            (self.root / BEST).unlink(missing_ok=True)
            return
        partial = self.root / f".{BEST}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(checkpoint_path(self.root, step).name)
        os.replace(partial, self.root / BEST)
        sync(self.root)

    def try_links(self) -> None:
        """Raises OSError where the disk takes no symbolic links."""
        partial = self.root / f".{BEST}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(".")
        partial.unlink()

    def commit(self, step: int, folder: Path, errors: list[BaseException], *, best: bool = False) -> None:
        """Makes a checkpoint visible whose shards are written; then the older ones go.

        Args:
            step: the checkpoint's.
            folder: what ``make_room`` gave.
            errors: what could not be written beside the shards; the first one ends it.
            best: it is the best one from now on.

        Raises:
            CheckpointError: it cannot be made visible, and is gone.
        """
        try:
            if errors:
                raise errors[0]
            _complete(folder)
            final = checkpoint_path(self.root, step)
            if final.exists():  # of an earlier attempt: damaged, or not the one that was resumed from
                self._remove(step)
            os.replace(folder, final)
            _write_synced(self.root / f".{LATEST}.partial", str(step))
            os.replace(self.root / f".{LATEST}.partial", self.root / LATEST)
            sync(self.root)
            if best:
                self.point_to_best(step)
        except OSError as error:
            raise CheckpointError(self.give_up(folder, str(error))) from error
        self._prune(step)

    def give_up(self, folder: Path, cause: str) -> str:
        """Removes what was written -> what to say."""
        free = shutil.disk_usage(self.root).free
        remove(folder)
        return f"{cause}, with {free / 1e9:.3g} GB free; {self._last_good()}"

    def _prune(self, newest: int) -> None:
        kept, best = 0, best_step(self.root)
        for step in steps_on_disk(self.root):
            if self.keep_last is None or step > newest:
                continue  # later ones belong to somebody who went back to this one
            if kept >= self.keep_last:
                if step != best:
                    self._remove(step)
            elif damage(checkpoint_path(self.root, step)) is None:
                kept += 1

    def _remove(self, step: int) -> None:
        """Takes a checkpoint out of sight in one go; its files go after that."""
        gone = self._passing(step, "removed")
        try:
            os.replace(checkpoint_path(self.root, step), gone)
        except OSError as error:
            log.warning("cannot remove %s: %s", checkpoint_path(self.root, step), error)
            return
        remove(gone)

    def _last_good(self) -> str:
        good = next((s for s in steps_on_disk(self.root) if not damage(checkpoint_path(self.root, s))), None)
        return "there is none before it" if good is None else f"that of step {good} is whole"


def _complete(folder: Path) -> None:
    """The files that say what the others are: Megatron's metadata.json, and the sizes."""
    write_format(folder)
    write_sizes(folder)
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def _write_synced(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
    sync(path)
