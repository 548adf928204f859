"""Blends: several prepared data sets as one, and how often each trajectory of theirs is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pear_megatron.data.store import TrajectoryDataset
from pear_megatron.data.trajectory import Trajectory


class TrajectoryBlend:
    """The trajectories of several sources, one source after the other.

    Attributes:
        meta, lengths, num_decisions, rewards: as TrajectoryDataset has them, joined.
        offsets: int64 [sources + 1], where each source begins.
    """

    def __init__(self, datasets: Sequence[TrajectoryDataset], names: Sequence[str]) -> None:
        self.datasets, self.names = list(datasets), list(names)
        self.offsets: np.ndarray = np.cumsum([0, *map(len, datasets)])
        self.lengths: np.ndarray = np.concatenate([d.lengths for d in datasets])
        self.num_decisions: np.ndarray = np.concatenate([d.num_decisions for d in datasets])
        self.rewards: np.ndarray = np.concatenate([d.rewards for d in datasets])
        self._width = max(d.meta.get("topk_width", 0) for d in datasets)
        self.meta: dict[str, Any] = {
            "files": [file for d in datasets for file in d.meta["files"]],
            "tokenizer_hash": datasets[0].meta["tokenizer_hash"],
            **{key: _added([d.meta[key] for d in datasets]) for key in ("counts", "notes")},
        }

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Trajectory:
        if not 0 <= index < len(self):
            raise IndexError(f"trajectory {index} of {len(self)}")
        source = int(np.searchsorted(self.offsets, index, side="right")) - 1
        found = replace(self.datasets[source][index - int(self.offsets[source])], source=source)
        if found.behavior_topk is None:
            return found
        return replace(found, behavior_topk=replace(found.behavior_topk, width=self._width))

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    def has(self, column: str) -> bool:
        """Whether the trajectories have an optional column; all sources are alike."""
        return self.datasets[0].has(column)

    def fingerprint(self) -> str:
        """Digest of the sources' digests (16 hex digits)."""
        return hashlib.sha256("".join(d.fingerprint() for d in self.datasets).encode()).hexdigest()[:16]


AnyDataset = TrajectoryDataset | TrajectoryBlend


def source_names(dataset: AnyDataset) -> list[str]:
    """Names of a blend's sources; none where there is only one."""
    return dataset.names if isinstance(dataset, TrajectoryBlend) else []


def _added(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {
        key: sum(one.get(key, 0) for one in counts) for key in dict.fromkeys(k for c in counts for k in c)
    }


@dataclass(frozen=True)
class Blend:
    """How often an epoch draws from each source: its own shuffled passes, one after the other.

    An epoch of a blend is as much as all sources hold together, in trajectories or in tokens; a source with a
    greater share is passed through more than once in it, one with a smaller share not wholly.

    Attributes:
        sizes: trajectories of each source.
        draws: trajectories that an epoch draws from each source; a fraction is carried over to the next one.
    """

    sizes: tuple[int, ...]
    draws: tuple[float, ...]

    @classmethod
    def of(cls, weights: Sequence[float], lengths: Sequence[np.ndarray], *, by: str) -> Blend:
        """From the sources' weights and the tokens of their trajectories; ``by`` is data.blend_by."""
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        sizes = np.array([len(n) for n in lengths])
        tokens = np.array([n.sum() for n in lengths], dtype=np.float64)
        draws = shares * tokens.sum() * sizes / tokens if by == "tokens" else shares * sizes.sum()
        return cls(tuple(sizes.tolist()), tuple(draws.tolist()))

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [sources + 1], where each source begins."""
        return np.cumsum([0, *self.sizes])

    def drawn_before(self, epoch: int) -> np.ndarray:
        """int64 [sources]: trajectories drawn from each before an epoch."""
        return np.floor(np.asarray(self.draws) * epoch + 1e-6).astype(np.int64)

    def epoch(self, epoch: int, seed: int) -> np.ndarray:
        """Indices, over all sources, that an epoch draws; a source's own in the order of its passes."""
        starts, ends = self.drawn_before(epoch), self.drawn_before(epoch + 1)
        parts = [
            self._stream(source, int(starts[source]), int(ends[source]), seed)
            for source in range(len(self.sizes))
        ]
        return np.concatenate(parts)

    def _stream(self, source: int, start: int, end: int, seed: int) -> np.ndarray:
        size = self.sizes[source]
        passes = range(start // size, -(-end // size))
        shuffled = [
            np.random.Generator(np.random.PCG64([seed, number, source + 1])).permutation(size)
            for number in passes
        ]
        if not shuffled:
            return np.empty(0, dtype=np.int64)
        base = passes.start * size
        return np.concatenate(shuffled)[start - base : end - base] + self.offsets[source]
