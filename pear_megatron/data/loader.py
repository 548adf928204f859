"""micro_batches: the share of a global batch that one data-parallel rank trains on."""

from __future__ import annotations

from collections.abc import Iterator

from pear_megatron.data.batches import PackedBatch, Trajectories, collate
from pear_megatron.data.packing import BatchPlan


def num_micro_batches(global_batch_size: int, dp_size: int, micro_batch_size: int) -> int:
    """Micro-batches per rank and step; ValueError if the sizes do not divide."""
    per_pass = dp_size * micro_batch_size
    if global_batch_size % per_pass:
        raise ValueError(
            f"train.global_batch_size = {global_batch_size} is not divisible by {per_pass} = {dp_size} "
            f"data-parallel ranks x train.micro_batch_size = {micro_batch_size}; change one of them"
        )
    return global_batch_size // per_pass


def micro_batches(
    trajectories: Trajectories,
    plan: BatchPlan,
    step: int,
    *,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> Iterator[PackedBatch]:
    """The micro-batches of one data-parallel rank at a step, as Megatron's schedules pull them.

    All ranks together see the rows of ``plan.rows(step)`` once each, whatever the layout. Every micro-batch
    is [micro_batch_size, seq_length / cp_size]; at the end of an epoch some may hold padding only.

    Raises:
        ValueError: the global batch does not divide, or there is no such rank.
    """
    count = num_micro_batches(plan.global_batch_size, dp_size, micro_batch_size)
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank = {dp_rank} of dp_size = {dp_size}")
    _, rows = plan.rows(step)
    starts = [(k * dp_size + dp_rank) * micro_batch_size for k in range(count)]
    batches = (
        collate(trajectories, rows[s : s + micro_batch_size], plan.seq_length, multiple=plan.multiple)
        for s in starts
    )
    return (batch.shard(cp_rank, cp_size) for batch in batches)
