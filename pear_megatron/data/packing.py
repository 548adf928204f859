"""Which trajectories share a row, in which order, at which step: pure functions of seed and step."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from pear_megatron.data.blend import Blend

_OPEN_ROWS = 128  # rows still being filled; beyond that the fullest is closed

Rows = list[list[int]]


def padding_multiple(cp_size: int) -> int:
    """What a trajectory's positions are padded to a multiple of: a rank holds two of 2n equal chunks of it."""
    return 2 * cp_size if cp_size > 1 else 1


def plan_epoch(
    lengths: Sequence[int] | np.ndarray,
    seq_length: int,
    *,
    seed: int,
    epoch: int,
    packing: bool = True,
    multiple: int = 1,
    drawn: np.ndarray | None = None,
) -> Rows:
    """Rows of trajectory indices for one epoch; every trajectory is in exactly one row, or as often as it was drawn.

    The order is a shuffle seeded by (seed, epoch); with packing, each trajectory in turn goes into the
    fullest row still open that has room for it (best fit); 128 rows are open at a time.

    Args:
        lengths: tokens of each trajectory; one of n tokens takes n - 1 positions.
        seq_length: positions in a row.
        seed: of the run.
        epoch: from 0.
        packing: False gives every trajectory a row of its own.
        multiple: a trajectory's positions are padded to a multiple of this (context parallelism).
        drawn: indices of the epoch's trajectories, where a blend draws them; None = each one once.

    Raises:
        ValueError: a trajectory does not fit into a row.
    """
    positions = -(-(np.asarray(lengths, dtype=np.int64) - 1) // multiple) * multiple
    if len(positions) and positions.max() > seq_length:
        longest = int(positions.argmax())
        raise ValueError(
            f"trajectory {longest} takes {positions[longest]} positions, a row has seq_length = {seq_length}"
        )
    shuffle = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = shuffle.permutation(len(positions) if drawn is None else drawn)
    if not packing:
        return [[i] for i in order.tolist()]
    return _best_fit(order.tolist(), positions.tolist(), seq_length)


def _best_fit(order: Sequence[int], positions: Sequence[int], seq_length: int) -> Rows:
    rows: Rows = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    for i in order:
        need = positions[i]
        place = bisect.bisect_left(open_rows, (need, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
            rows[row].append(i)
        else:
            room, row = seq_length, len(rows)
            rows.append([i])
        if room > need:
            bisect.insort(open_rows, (room - need, row))
            if len(open_rows) > _OPEN_ROWS:
                del open_rows[0]
    return rows


class BatchPlan:
    """The rows of every global batch, for as many epochs as are asked for.

    ``rows(step)`` depends on nothing but the arguments here and ``step``: not on the parallel layout, not on
    the steps before, so that a run resumes exactly at any step. The last batch of an epoch is filled up with
    empty rows; no trajectory is dropped. With packing or a blend, epochs may differ in their number of steps.

    Args:
        lengths: tokens of each trajectory.
        seq_length: positions in a row.
        global_batch_size: rows in a batch, over all data-parallel ranks and micro-batches.
        seed: of the run.
        packing: see ``plan_epoch``.
        multiple: see ``plan_epoch``; divides ``seq_length``.
        blend: how often each source of the trajectories is drawn; None = every trajectory once an epoch.

    Raises:
        ValueError: there is no trajectory, or one does not fit, or ``global_batch_size`` is below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        seq_length: int,
        global_batch_size: int,
        *,
        seed: int,
        packing: bool = True,
        multiple: int = 1,
        blend: Blend | None = None,
    ) -> None:
        if seq_length % multiple:
            raise ValueError(f"seq_length = {seq_length} is not divisible by multiple = {multiple}")
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size = {global_batch_size}; it must be at least 1")
        if not len(lengths):
            raise ValueError("there are no trajectories to make batches of")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self.seq_length = seq_length
        self.global_batch_size = global_batch_size
        self.multiple = multiple
        self._seed = seed
        self._packing = packing
        self._blend = blend
        self._first_steps = [0]  # of each epoch planned so far, and of the one after
        self._kept: tuple[int, Rows] = (-1, [])
        self._kept_counts: tuple[int, np.ndarray] = (-1, np.empty(0))

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Global batches in an epoch."""
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def first_step(self, epoch: int) -> int:
        """The step at which an epoch begins; epoch 0 begins at step 0."""
        while len(self._first_steps) <= epoch:
            rows = self._epoch_rows(len(self._first_steps) - 1)
            self._first_steps.append(self._first_steps[-1] + -(-len(rows) // self.global_batch_size))
        return self._first_steps[epoch]

    def rows(self, step: int) -> tuple[int, Rows]:
        """(epoch, ``global_batch_size`` rows of trajectory indices) of a step, counted from 0."""
        if step < 0:
            raise ValueError(f"step = {step}; steps count from 0")
        while self._first_steps[-1] <= step:
            self.first_step(len(self._first_steps))
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        start = (step - self._first_steps[epoch]) * self.global_batch_size
        rows = self._epoch_rows(epoch)[start : start + self.global_batch_size]
        return epoch, rows + [[] for _ in range(self.global_batch_size - len(rows))]

    def drawn(self, step: int, offsets: np.ndarray) -> np.ndarray:
        """int64 [sources]: trajectories of each source in the steps before this one, counted from 0.

        ``offsets``, int64 [sources + 1], where each source's indices begin, are the same in every call.
        """
        if step == 0:
            return np.zeros(len(offsets) - 1, dtype=np.int64)
        epoch, _ = self.rows(step - 1)
        if self._kept_counts[0] != epoch:
            self._kept_counts = (epoch, self._counts(self._epoch_rows(epoch), offsets))
        before = np.diff(offsets) * epoch if self._blend is None else self._blend.drawn_before(epoch)
        return before + self._kept_counts[1][step - 1 - self._first_steps[epoch]]

    def _counts(self, rows: Rows, offsets: np.ndarray) -> np.ndarray:
        """int64 [steps, sources]: trajectories of each source up to the end of each of an epoch's steps."""
        where = np.repeat(np.arange(len(rows)) // self.global_batch_size, [len(row) for row in rows])
        source = np.searchsorted(offsets, [i for row in rows for i in row], side="right") - 1
        counts = np.zeros((-(-len(rows) // self.global_batch_size), len(offsets) - 1), dtype=np.int64)
        np.add.at(counts, (where, source), 1)
        return counts.cumsum(axis=0)

    def _epoch_rows(self, epoch: int) -> Rows:
        if self._kept[0] != epoch:
            rows = plan_epoch(
                self._lengths,
                self.seq_length,
                seed=self._seed,
                epoch=epoch,
                packing=self._packing,
                multiple=self.multiple,
                drawn=None if self._blend is None else self._blend.epoch(epoch, self._seed),
            )
            self._kept = (epoch, rows)
        return self._kept[1]
