"""OfflineBatches: offline trajectories as a data iterator for a loop that asks for one micro-batch at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Self

import torch

from pear_megatron.data import (
    BatchPlan,
    DataConfig,
    PackedBatch,
    TrajectoryDataset,
    micro_batches,
    padding_multiple,
    prepare_everywhere,
    require_files,
)
from pear_megatron.data.columns import Columns
from pear_megatron.errors import RecipeError

log = logging.getLogger("pear_megatron")


def open_trajectories(
    config: DataConfig, *, needs_logprobs: bool, vocab_size: int, columns: Columns
) -> TrajectoryDataset:
    """Prepares the files on rank 0 and opens them on every rank; every rank calls it.

    Args:
        config: the files, the row length and where the prepared trajectories are kept.
        needs_logprobs: False for plain SFT: ``needs_behavior_logprobs(pear)``.
        vocab_size: real tokens of the model.
        columns: what else of the rows is read: ``Columns.of(pear)``.

    Raises:
        DataError: what is wrong with the data, by file and line; on every rank.
        RecipeError: a blend, or held-out data, which only this package's trainer reads.
    """
    require_files(config)
    found = prepare_everywhere(
        config,
        config.train_sources,
        require_behavior_logprobs=needs_logprobs,
        vocab_size=vocab_size,
        columns=columns,
    )
    assert isinstance(found, TrajectoryDataset)  # of one source
    return found


def _routing_one_token(padding_mask: torch.Tensor) -> torch.Tensor:
    """Padding alone, but for a position: Megatron's routers divide their losses by the tokens that are none."""
    changed = padding_mask.clone()
    changed[0, 0] = False
    return changed


class OfflineBatches(Iterator[PackedBatch]):
    """This rank's micro-batches, step after step and epoch after epoch, without end.

    All data-parallel ranks together see every row of a global batch once. Which trajectories a step sees
    depends on the seed and the step alone: a run that resumes, on whatever layout, goes on where it was.

    Args:
        dataset: the trajectories.
        seq_length: positions in a row.
        global_batch_size: rows in a step, over all data-parallel ranks.
        micro_batch_size: rows in a micro-batch.
        dp_rank, dp_size, cp_rank, cp_size: where this rank stands; the batches are its zigzag shards.
        seed: of the order.
        consumed_samples: rows that were seen before, as Megatron counts samples.
        packing: False gives each trajectory a row of its own.
        period: steps after which it begins again, for evaluations that all see the same; None = never.
        device: where the batches go; None = they stay on the CPU.

    Attributes:
        steps_per_epoch: of the first epoch; others may differ by a step, since rows are packed anew.
        micro_batches_per_step: of this rank.

    Raises:
        RecipeError: the batch does not divide among the ranks, or consumed_samples is not at a step's end.
    """

    def __init__(
        self,
        dataset: TrajectoryDataset,
        *,
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp_rank: int = 0,
        cp_size: int = 1,
        seed: int = 0,
        consumed_samples: int = 0,
        packing: bool = True,
        period: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if global_batch_size % (dp_size * micro_batch_size):
            raise RecipeError(
                f"a global batch of {global_batch_size} rows does not divide into micro-batches of "
                f"{micro_batch_size} on {dp_size} data-parallel ranks; change one of them"
            )
        multiple = padding_multiple(cp_size)
        self.plan = BatchPlan(
            dataset.lengths, seq_length, global_batch_size, seed=seed, packing=packing, multiple=multiple
        )
        self.steps_per_epoch = self.plan.steps_per_epoch()
        self.micro_batches_per_step = global_batch_size // (dp_size * micro_batch_size)
        self._global_batch_size, self._period, self._device = global_batch_size, period, device
        self.consumed_samples = consumed_samples
        self._micro_batches = partial(
            micro_batches,
            dataset,
            self.plan,
            dp_rank=dp_rank,
            dp_size=dp_size,
            micro_batch_size=micro_batch_size,
            cp_rank=cp_rank,
            cp_size=cp_size,
        )

    @property
    def consumed_samples(self) -> int:
        """Rows of the steps that were begun, over all ranks; set it to go on from there."""
        return self._step * self._global_batch_size

    @consumed_samples.setter
    def consumed_samples(self, rows: int) -> None:
        if rows % self._global_batch_size:
            raise RecipeError(
                f"{rows} rows were consumed, which is no multiple of the global batch of "
                f"{self._global_batch_size}: the run would see other batches than it would have; resume with the batch "
                "size that it had (no ramp-up)"
            )
        self._step = rows // self._global_batch_size
        self._current: Iterator[PackedBatch] = iter(())

    def announce(self, iterations: int | None) -> None:
        """Says, on one rank, how many epochs a loop's iterations come to: its own settings count neither."""
        log.warning(
            "PEAR: an epoch is %d iterations; %.2f epochs are asked for",
            self.steps_per_epoch,
            (iterations or 0) / self.steps_per_epoch,
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PackedBatch:
        batch = next(self._current, None)
        if batch is None:
            step = self._step if self._period is None else self._step % self._period
            self._current = self._micro_batches(step)
            self._step += 1
            batch = next(self._current)
        if batch.padding_mask.all():  # at the end of an epoch
            batch = replace(batch, padding_mask=_routing_one_token(batch.padding_mask))
        return batch if self._device is None else batch.to(self._device, non_blocking=True)
