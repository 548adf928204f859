"""CheckpointSaver: writes checkpoints, in the background if asked, so that each appears whole or not at all.

A checkpoint is written into a folder of a passing name by a forked process of every rank (mcore's
AsyncCallsQueue); a save that is not asynchronous waits for them. Rank 0 then writes down the sizes of the
files, renames the folder, and only then changes Megatron's tracker file. An error on one rank is an error
on all of them, and leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pear_megatron.megatron import rng
from pear_megatron.megatron.background import (
    bytes_to_write,
    first_cause,
    saving_strategy,
    use_results_file,
    write_format,
)
from pear_megatron.megatron.checkpoint import (
    FILES,
    LATEST,
    SHARDING,
    CheckpointError,
    checkpoint_path,
    damage,
    model_state,
    steps_on_disk,
)
from pear_megatron.megatron.layout import Layout
from pear_megatron.megatron.megatron_lm import megatron_lm_state

log = logging.getLogger("pear_megatron")

_PASSING = (".partial-", ".removed-")


@dataclass
class _Pending:
    """A checkpoint that is being written.

    Attributes:
        errors: what rank 0 could not write after the shards (see ``saving_strategy``).
    """

    step: int
    partial: Path
    errors: list[BaseException]


class CheckpointSaver:
    """Checkpoints of one run; every method is called by every rank.

    Args:
        root: folder of the checkpoints; made if need be.
        layout: where this rank stands.
        keep_last: how many stay; None = all.
        asynchronous: write in the background.

    Raises:
        CheckpointError: ``root`` cannot be written to.
    """

    def __init__(
        self, root: Path, layout: Layout, *, keep_last: int | None = None, asynchronous: bool = False
    ) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.root, self.layout = root, layout
        self.keep_last, self.asynchronous = keep_last, asynchronous
        self._queue = AsyncCallsQueue()
        self._results = use_results_file()
        self._pending: _Pending | None = None
        self._on_main(self._tidy, f"checkpoints cannot be written to {root}")

    def save(
        self, step: int, model: Any, optimizer: Any, scheduler: Any, common: dict[str, Any] | None = None
    ) -> None:
        """Saves a checkpoint, or begins to; one that is still being written is waited for first.

        Args:
            step: optimizer steps done.
            model: a model, wrapped or not, or a list of chunks.
            optimizer, scheduler: of the run; None = the checkpoint is of a model alone.
            common: what else to remember, equal on all ranks: plain values.

        Raises:
            CheckpointError: this checkpoint, or the one before, could not be written. Earlier ones stand.
        """
        from megatron.core import dist_checkpointing

        self.finish()
        state = model_state(model)
        if optimizer is not None:
            state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=SHARDING)
            state["scheduler"] = scheduler.state_dict()
        state["rng"] = rng.sharded_state(self.layout)
        state |= {"step": step, "layout": rng.describe(self.layout), **(common or {})}
        state |= megatron_lm_state(step, self.layout, has_optimizer=optimizer is not None)

        size = torch.tensor(bytes_to_write(state), dtype=torch.float64, device=self.layout.device)
        torch.distributed.all_reduce(size)
        what = f"the checkpoint of step {step} cannot be written to {self.root}"
        folder = self._on_main(partial(self._make_room, step, int(size)), what)
        pending = _Pending(step, Path(folder), [])
        options: dict[str, Any] = {}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            options["async_strategy"] = "mcore"
        self._results.clear()
        try:
            request = dist_checkpointing.save(
                state,
                folder,
                sharded_strategy=saving_strategy(pending.errors),
                async_sharded_save=True,
                **options,
            )
        except (OSError, RuntimeError) as error:  # on this rank alone, so that nobody may wait for it
            raise CheckpointError(f"{what}: {error}") from error
        request.finalize_fns.pop()  # it writes metadata.json on rank 0, where an error would hang the others
        self._queue.schedule_async_request(request)
        self._pending = pending
        if not self.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Makes a checkpoint visible if its writing is done; raises what ``save`` raises."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Waits until nothing is being written; raises what ``save`` raises."""
        self._finalize(blocking=True)

    def abort(self) -> None:
        """Ends this rank's writing, when the run fails; the half-written folder goes with the next start."""
        for call in self._queue.async_calls:
            call.async_caller.close(abort=True)
        self._queue.async_calls.clear()
        self._pending = None

    def _finalize(self, *, blocking: bool) -> None:
        from torch.distributed.checkpoint.api import CheckpointException  # not an Exception

        pending = self._pending
        if pending is None:
            return
        what = f"the checkpoint of step {pending.step} cannot be written to {self.root}"
        try:
            done = self._queue.maybe_finalize_async_calls(blocking=blocking)
        except (Exception, CheckpointException) as error:  # raised on every rank
            self._pending = None
            why = self._on_main(partial(self._give_up, pending, first_cause(error)), what)
            raise CheckpointError(f"{what}: {why}") from error
        if done:
            self._pending = None
            self._on_main(partial(self._commit, pending), what)

    def _on_main(self, action: Callable[[], Any], what: str) -> Any:
        """Runs something on rank 0 -> what it returned, on every rank; its error is everybody's."""
        outcome: list[Any] = [None, None]
        if self.layout.is_main:
            try:
                outcome[0] = action()
            except (OSError, CheckpointError) as error:
                outcome[1] = str(error)
        torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise CheckpointError(f"{what}: {outcome[1]}")
        return outcome[0]

    def _last_good(self) -> str:
        good = next((s for s in steps_on_disk(self.root) if not damage(checkpoint_path(self.root, s))), None)
        return "there is none before it" if good is None else f"that of step {good} is whole"

    # The rest runs on rank 0 alone.

    def _tidy(self) -> None:
        """Makes the folder, tries whether it takes files, and clears what an interrupted run left."""
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.root) as file:
            file.write(b"\0" * 4096)
        for path in self.root.iterdir():
            if path.name.startswith(".iter_") and any(word in path.name for word in _PASSING):
                shutil.rmtree(path, ignore_errors=True)

    def _make_room(self, step: int, size: int) -> str:
        """The new folder for a checkpoint of that many bytes, if they fit on the disk."""
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

    def _commit(self, pending: _Pending) -> None:
        """Makes a checkpoint that is written visible, then the older ones go."""
        try:
            if pending.errors:
                raise pending.errors[0]
            _complete(pending.partial)
            final = checkpoint_path(self.root, pending.step)
            if final.exists():  # of an earlier attempt: damaged, or not the one that was resumed from
                self._remove(pending.step)
            os.replace(pending.partial, final)
            _write_synced(self.root / f".{LATEST}.partial", str(pending.step))
            os.replace(self.root / f".{LATEST}.partial", self.root / LATEST)
            _sync(self.root)
        except OSError as error:
            raise CheckpointError(self._give_up(pending, str(error))) from error
        self._prune(pending.step)

    def _give_up(self, pending: _Pending, cause: str) -> str:
        """Removes what was written -> what to say."""
        free = shutil.disk_usage(self.root).free
        shutil.rmtree(pending.partial, ignore_errors=True)
        return f"{cause}, with {free / 1e9:.3g} GB free; {self._last_good()}"

    def _prune(self, newest: int) -> None:
        kept = 0
        for step in steps_on_disk(self.root):
            if self.keep_last is None or step > newest:
                continue  # later ones belong to somebody who went back to this one
            if kept >= self.keep_last:
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
        shutil.rmtree(gone, ignore_errors=True)


def save_model(root: Path, step: int, layout: Layout, model: Any) -> Path:
    """Writes a checkpoint of a model alone, for ``checkpoint.pretrained`` -> its folder.

    Raises:
        CheckpointError: it cannot be written.
    """
    CheckpointSaver(root, layout).save(step, model, None, None)
    return checkpoint_path(root, step)


def _complete(folder: Path) -> None:
    """The files that say what the others are: Megatron's metadata.json, and the sizes."""
    write_format(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / FILES).write_text(json.dumps(sizes, indent=1))
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    """Has the disk hold a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
