"""Batches of trajectories of like length under a token budget, and their log-probs back in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pear_megatron.data.batches import PackedBatch, collate
from pear_megatron.data.topk import TopK
from pear_megatron.data.trajectory import Trajectory
from pear_megatron.errors import ScoreError

_MAX_NAMED = 8


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in batches of at most ``max_tokens`` = rows x longest row; a longer row has one to itself.

    The longest rows come first, so that a batch too large for the memory is met at once.
    """
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * longest <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches


def right_padded(trajectories: Sequence[Trajectory], batch: Sequence[int]) -> PackedBatch:
    """The batch, a row a trajectory, padded on the right to its own longest; labels are shifted."""
    positions = max(len(trajectories[i].input_ids) for i in batch) - 1
    return collate(trajectories, [[i] for i in batch], positions)


def in_place(
    trajectories: Sequence[Trajectory], batches: Sequence[Sequence[int]], logprobs: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Each batch's float32 [B, S], aligned with its labels -> float32 [n] per trajectory; ScoreError if not finite."""
    scored: list[np.ndarray] = [np.zeros(len(t.input_ids), dtype=np.float32) for t in trajectories]
    for batch, rows in zip(batches, logprobs, strict=True):
        for i, row in zip(batch, rows, strict=True):
            decisions = trajectories[i].loss_mask[1:]
            scored[i][1:] = np.where(decisions, row[: len(decisions)], np.float32(0))
    bad = [
        trajectory.id
        for trajectory, row in zip(trajectories, scored, strict=True)
        if not np.isfinite(row).all()
    ]
    if bad:
        more = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
        raise ScoreError(
            f"the model gives log-probs that are not finite to {', '.join(bad[:_MAX_NAMED])}{more}; score with "
            "--dtype fp32, look at these rows, or check that the checkpoint is whole"
        )
    return scored


def topk_in_place(
    trajectories: Sequence[Trajectory],
    batches: Sequence[Sequence[int]],
    entries: Sequence[Sequence[np.ndarray]],
) -> list[TopK]:
    """Each batch's ids and log-probs, [decisions, k + 1] as ``top_tokens`` has them -> a TopK per trajectory."""
    found: dict[int, TopK] = {}
    for batch, (ids, logprobs) in zip(batches, entries, strict=True):
        start = 0
        for i in batch:
            end = start + int(trajectories[i].loss_mask.sum())
            found[i] = TopK.of_padded(ids[start:end], logprobs[start:end])
            start = end
    return [found[i] for i in range(len(trajectories))]
