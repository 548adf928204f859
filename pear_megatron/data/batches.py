"""PackedBatch: rows of trajectories as the tensors a Megatron model and the PEAR loss take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch

from pear_megatron.data.trajectory import Trajectory
from pear_megatron.ops.context_parallel import check_shards, shard_positions

_NO_LABEL = -100  # what Megatron and torch ignore
_PER_POSITION = (
    "tokens",
    "labels",
    "loss_mask",
    "behavior_logprobs",
    "position_ids",
    "padding_mask",
    "token_weights",
    "behavior_topk",
    "reference_logprobs",
)


class Trajectories(Protocol):
    """What ``collate`` reads from: a TrajectoryDataset, or a list."""

    def __getitem__(self, index: int, /) -> Trajectory:
        """The trajectory of an index."""

    def __len__(self) -> int:
        """How many there are."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A micro-batch of B rows of S positions, shifted: position p is scored against ``labels[p]``.

    Every trajectory is a segment of the flat B*S positions, and so is the padding at the end of a row.
    A context-parallel rank's shard has 1/n of the positions of every segment: S is then the rank's, and
    ``cu_seqlens``, ``reward``, ``trajectory_index``, ``source`` and ``max_seqlen`` stay those of the whole batch.

    Attributes:
        tokens: int64 [B, S], 0 on padding.
        labels: int64 [B, S], the token after each position where that is a decision, else -100.
        loss_mask: bool [B, S], aligned with ``labels``.
        behavior_logprobs: float32 [B, S], aligned with ``labels``, 0 off the decisions.
        position_ids: int64 [B, S], from 0 in every segment.
        padding_mask: bool [B, S], True on padding (Megatron's convention: a mixture of experts does not route it).
        cu_seqlens: int32 [n + 1], the segments' ends over B*S; ``cu_seqlens[-1] == B * S``.
        reward: float32 [n], one per segment, 1 on padding.
        trajectory_index: int64 [n], the dataset's index, -1 on padding.
        max_seqlen: length of the longest segment.
        token_weights: float32 [B, S], aligned with ``labels``, 0 off the decisions; None = 1 on all of them.
        source: int64 [n], which of a blend's sources a trajectory comes from, 0 on padding; None = not known.
        behavior_topk: (ids int32 [B, S, k], log-probs float32 [B, S, k]) of the behaviour policy's likeliest tokens,
            aligned with ``labels``; -1 and -inf where there is no entry. k is the data set's. None = not needed.
        reference_logprobs: float32 [B, S], of the initial model, as behavior_logprobs; None = not needed.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    behavior_logprobs: torch.Tensor
    position_ids: torch.Tensor
    padding_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    reward: torch.Tensor
    trajectory_index: torch.Tensor
    max_seqlen: int
    token_weights: torch.Tensor | None = None
    source: torch.Tensor | None = None
    behavior_topk: tuple[torch.Tensor, torch.Tensor] | None = None
    reference_logprobs: torch.Tensor | None = None

    def attention_mask(self) -> torch.Tensor:
        """Block-diagonal causal mask, bool [B, 1, S, S], True = masked out (Megatron's convention).

        Padding attends to its own segment, so that no row of a softmax is empty.
        """
        batch, length = self.tokens.shape
        segments = torch.arange(len(self.reward), device=self.tokens.device)
        lengths = self.cu_seqlens.diff().long()
        segment = segments.repeat_interleave(lengths, output_size=batch * length).view(batch, length)
        apart = segment[:, :, None] != segment[:, None, :]  # [B, S, S]
        later = torch.ones(length, length, dtype=torch.bool, device=apart.device).triu(1)
        return (apart | later)[:, None]

    def shard(self, rank: int, ranks: int) -> PackedBatch:
        """What one of n context-parallel ranks holds: chunks r and 2n-1-r of the 2n of every segment."""
        if ranks == 1:
            return self
        rows, length = self.tokens.shape
        local = rows * length // ranks
        check_shards(self.cu_seqlens, ranks, "zigzag", local)
        mine = shard_positions(self.cu_seqlens, ranks, "zigzag", local)[rank]  # [local]
        return self._mapped(
            _PER_POSITION, lambda x: x.flatten(0, 1)[mine].view(rows, local // rows, *x.shape[2:])
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        return self._mapped([f.name for f in fields(self)], lambda x: x.to(device, non_blocking=non_blocking))

    def _mapped(self, names: Sequence[str], change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        """With these fields' tensors changed."""
        changed: dict[str, Any] = {}
        for name in names:
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                changed[name] = change(value)
            elif isinstance(value, tuple):
                changed[name] = tuple(map(change, value))
        return replace(self, **changed)


def collate(
    trajectories: Trajectories, rows: Sequence[Sequence[int]], seq_length: int, *, multiple: int = 1
) -> PackedBatch:
    """Build the batch of some rows of trajectory indices; an empty row is all padding.

    A trajectory of n tokens takes n - 1 positions: inputs are its first n - 1 tokens, labels its last. This
    is the one place where the shift happens (docs/method.md, Where it goes wrong: off by one).

    Args:
        trajectories: where the indices point.
        rows: B lists of indices, in the order they stand in the row.
        seq_length: S.
        multiple: every segment is padded, at its end, to a multiple of this.

    Raises:
        ValueError: a row holds more than ``seq_length`` positions, or a trajectory's arrays differ in length.
    """
    shape = (len(rows), seq_length)
    tokens = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, _NO_LABEL, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=bool)
    behavior = np.zeros(shape, dtype=np.float32)
    position_ids = np.zeros(shape, dtype=np.int64)
    padding_mask = np.ones(shape, dtype=bool)
    chosen = [[trajectories[index] for index in row] for row in rows]
    weighted = any(trajectory.token_weights is not None for row in chosen for trajectory in row)
    token_weights = np.zeros(shape, dtype=np.float32) if weighted else None
    optional = _OptionalColumns(trajectories, shape)
    lengths, rewards, indices, sources = [], [], [], []
    for r, row in enumerate(rows):
        start = 0
        for index, trajectory in zip(row, chosen[r], strict=True):
            n = len(trajectory.input_ids) - 1
            for name in ("loss_mask", "behavior_logprobs"):
                if len(getattr(trajectory, name)) != n + 1:
                    raise ValueError(
                        f"trajectory {trajectory.id}: {name} has {len(getattr(trajectory, name))} entries and "
                        f"input_ids {n + 1}; give one per token of the whole trajectory, prompt included"
                    )
            padded = -(-n // multiple) * multiple
            if start + padded > seq_length:
                raise ValueError(f"row {list(row)} takes more than seq_length = {seq_length} positions")
            here = (r, slice(start, start + n))
            decisions = trajectory.loss_mask[1:]
            tokens[here] = trajectory.input_ids[:-1]
            labels[here] = np.where(decisions, trajectory.input_ids[1:], _NO_LABEL)
            loss_mask[here] = decisions
            padding_mask[here] = False
            behavior[here] = np.where(decisions, trajectory.behavior_logprobs[1:], 0.0)
            if token_weights is not None:
                own = 1.0 if trajectory.token_weights is None else trajectory.token_weights[1:]
                token_weights[here] = np.where(decisions, own, 0.0)
            optional.fill(here, decisions, trajectory)
            position_ids[r, start : start + padded] = np.arange(padded)
            lengths.append(padded)
            rewards.append(trajectory.reward)
            indices.append(index)
            sources.append(trajectory.source)
            start += padded
        if start < seq_length:
            position_ids[r, start:] = np.arange(seq_length - start)
            lengths.append(seq_length - start)
            rewards.append(1.0)
            indices.append(-1)
            sources.append(0)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        behavior_logprobs=torch.from_numpy(behavior),
        position_ids=torch.from_numpy(position_ids),
        padding_mask=torch.from_numpy(padding_mask),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        reward=torch.tensor(rewards, dtype=torch.float32),
        trajectory_index=torch.tensor(indices, dtype=torch.int64),
        max_seqlen=max(lengths, default=0),
        token_weights=None if token_weights is None else torch.from_numpy(token_weights),
        source=torch.tensor(sources, dtype=torch.int64),
        behavior_topk=optional.behavior_topk,
        reference_logprobs=optional.reference_logprobs,
    )


class _OptionalColumns:
    """The columns [B, S] of a batch that all trajectories of a data set have, or none: padding alone has them too."""

    def __init__(self, trajectories: Trajectories, shape: tuple[int, int]) -> None:
        first = trajectories[0] if len(trajectories) else None
        self.behavior_topk: tuple[torch.Tensor, torch.Tensor] | None = None
        self.reference_logprobs: torch.Tensor | None = None
        if first is not None and first.behavior_topk is not None:
            wide = (*shape, first.behavior_topk.width)
            self.behavior_topk = (
                torch.full(wide, -1, dtype=torch.int32),
                torch.full(wide, -torch.inf, dtype=torch.float32),
            )
        if first is not None and first.reference_logprobs is not None:
            self.reference_logprobs = torch.zeros(shape, dtype=torch.float32)

    def fill(self, here: tuple[int, slice], decisions: np.ndarray, trajectory: Trajectory) -> None:
        """Shifts a trajectory of n tokens into n - 1 positions of a row; decisions is its mask, bool [n - 1]."""
        if self.behavior_topk is not None:
            assert trajectory.behavior_topk is not None
            padded = trajectory.behavior_topk.padded(self.behavior_topk[0].shape[-1])
            for column, values in zip(self.behavior_topk, padded, strict=True):
                column.numpy()[here][decisions] = values
        if self.reference_logprobs is not None:
            assert trajectory.reference_logprobs is not None
            own = np.where(decisions, trajectory.reference_logprobs[1:], 0.0)
            self.reference_logprobs.numpy()[here] = own
