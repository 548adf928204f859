"""CheckpointSaver: writes checkpoints, in the background if asked, so that each appears whole or not at all.

A checkpoint is written into a folder of a passing name by a forked process of every rank (mcore's
AsyncCallsQueue); a save that is not asynchronous waits for them. Rank 0 then writes down the sizes of the
files, renames the folder, and only then changes Megatron's tracker file. An error on one rank is an error
on all of them, and leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pear_megatron.errors import CheckpointError
from pear_megatron.megatron.checkpoint.background import (
    bytes_to_write,
    first_cause,
    saving_strategy,
    use_results_file,
)
from pear_megatron.megatron.checkpoint.folder import CheckpointFolder
from pear_megatron.megatron.checkpoint.megatron_lm import megatron_lm_state
from pear_megatron.megatron.checkpoint.paths import checkpoint_path, damage
from pear_megatron.megatron.checkpoint.state import SHARDING, model_state, rng, versions
from pear_megatron.megatron.layout import Layout
from pear_megatron.ranks import from_main


@dataclass
class _Pending:
    """A checkpoint that is being written.

    Attributes:
        errors: what rank 0 could not write after the shards (see ``saving_strategy``).
        best: it is to be the best one.
    """

    step: int
    folder: Path
    errors: list[BaseException]
    best: bool


class CheckpointSaver:
    """Checkpoints of one run; every method is called by every rank.

    Args:
        root: folder of the checkpoints; made if need be.
        layout: where this rank stands.
        keep_last: how many stay; None = all.
        asynchronous: write in the background.
        on_commit: called with the step of a checkpoint once it is visible, on every rank.

    Raises:
        CheckpointError: ``root`` cannot be written to.
    """

    def __init__(
        self,
        root: Path,
        layout: Layout,
        *,
        keep_last: int | None = None,
        asynchronous: bool = False,
        on_commit: Callable[[int], None] | None = None,
    ) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.layout, self.asynchronous, self._on_commit = layout, asynchronous, on_commit
        self.folder = CheckpointFolder(root, keep_last)
        self._queue = AsyncCallsQueue()
        self._results = use_results_file()
        self._pending: _Pending | None = None
        self._on_main(self.folder.tidy, f"checkpoints cannot be written to {root}")

    def keep_best(self, step: int | None) -> int | None:
        """Has the link to the best checkpoint name that of a step again, when a run begins or goes on.

        Returns:
            The step; None if its checkpoint is not there, or damaged.

        Raises:
            CheckpointError: the disk takes no symbolic links.
        """

        def point() -> int | None:
            whole = step is not None and damage(checkpoint_path(self.folder.root, step)) is None
            self.folder.try_links()
            self.folder.point_to_best(step if whole else None)
            return step if whole else None

        return self._on_main(point, f"checkpoint.keep_best: no link can be made in {self.folder.root}")

    def save(
        self,
        step: int,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        common: dict[str, Any] | None = None,
        *,
        best: bool = False,
    ) -> None:
        """Saves a checkpoint, or begins to; one that is still being written is waited for first.

        Args:
            step: optimizer steps done.
            model: a model, wrapped or not, or a list of chunks.
            optimizer, scheduler: of the run; None = the checkpoint is of a model alone.
            common: what else to remember, equal on all ranks: plain values.
            best: it is better than all before it, and stays until a better one is there.

        Raises:
            CheckpointError: this checkpoint, or the one before, could not be written. Earlier ones stand.
        """
        from megatron.core import dist_checkpointing

        self.finish()
        state = self._state(step, model, optimizer, scheduler) | (common or {})
        size = torch.tensor(bytes_to_write(state), dtype=torch.float64, device=self.layout.device)
        torch.distributed.all_reduce(size)
        what = f"the checkpoint of step {step} cannot be written to {self.folder.root}"
        folder = self._on_main(partial(self.folder.make_room, step, int(size)), what)
        pending = _Pending(step, Path(folder), [], best)
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
            why = self.folder.give_up(pending.folder, str(error)) if self.layout.is_main else str(error)
            raise CheckpointError(f"{what}: {why}") from error
        request.finalize_fns.pop()  # it writes metadata.json on rank 0, where an error would hang the others
        self._queue.schedule_async_request(request)
        self._pending = pending
        if not self.asynchronous:
            self.finish()

    def _state(self, step: int, model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
        state = model_state(model)
        if optimizer is not None:
            state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=SHARDING)
            state["scheduler"] = scheduler.state_dict()
        state |= {"step": step, "versions": versions()}
        state |= {"layout": rng.describe(self.layout), "rng": rng.sharded_state(self.layout)}
        return state | megatron_lm_state(step, self.layout, has_optimizer=optimizer is not None)

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
        what = f"the checkpoint of step {pending.step} cannot be written to {self.folder.root}"
        try:
            done = self._queue.maybe_finalize_async_calls(blocking=blocking)
        except (Exception, CheckpointException) as error:  # raised on every rank
            self._pending = None
            why = self._on_main(partial(self.folder.give_up, pending.folder, first_cause(error)), what)
            raise CheckpointError(f"{what}: {why}") from error
        if done:
            self._pending = None
            commit = partial(
                self.folder.commit, pending.step, pending.folder, pending.errors, best=pending.best
            )
            self._on_main(commit, what)
            if self._on_commit is not None:
                self._on_commit(pending.step)

    def _on_main(self, action: Callable[[], Any], what: str) -> Any:
        """What something returns on rank 0, on every rank; its error begins with ``what``."""

        def attempt() -> Any:
            try:
                return action()
            except (OSError, CheckpointError) as error:
                raise CheckpointError(f"{what}: {error}") from error

        return from_main(attempt)


def save_model(root: Path, step: int, layout: Layout, model: Any) -> Path:
    """Writes a checkpoint of a model alone, for ``checkpoint.pretrained`` -> its folder.

    Raises:
        CheckpointError: it cannot be written.
    """
    CheckpointSaver(root, layout).save(step, model, None, None)
    return checkpoint_path(root, step)
