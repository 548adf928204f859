"""Log ratios and weights of trajectories, computed as training computes them, as flat numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pear_megatron.alignment import Alignment, alignment_sums, read_alignment
from pear_megatron.config import PearConfig
from pear_megatron.data.batches import collate
from pear_megatron.data.trajectory import Trajectory
from pear_megatron.weights import importance_weights

_PACK = 64  # trajectories that are collated at a time


@dataclass(frozen=True)
class Pack:
    """Trajectories end to end, shifted and masked by ``collate`` as training's batches are; see PackedBatch."""

    logprobs: Tensor  # [T] float32, the policy's, 0 off the mask
    behavior_logprobs: Tensor  # [T] float32
    mask: Tensor  # [T] bool
    cu_seqlens: Tensor  # [N + 1] int32
    reward: np.ndarray  # [N] float32
    reference_logprobs: Tensor | None = None  # [T] float32, of the initial model, where the rows have them
    ratio: str = "behavior"  # whose log-probs ``log_ratio`` is taken against: PearConfig.ratio

    @cached_property
    def segment(self) -> np.ndarray:
        """Int64 [decisions], the trajectory that each decision is in."""
        lengths = self.cu_seqlens.diff().numpy()
        return np.repeat(np.arange(len(lengths)), lengths)[self.mask.numpy()]

    @cached_property
    def num_decisions(self) -> np.ndarray:
        """Int64 [N]."""
        return np.bincount(self.segment, minlength=len(self.reward))

    @cached_property
    def position(self) -> np.ndarray:
        """Int64 [decisions], from 0 in each trajectory."""
        starts = np.cumsum(self.num_decisions) - self.num_decisions
        return np.arange(len(self.segment)) - starts[self.segment]

    @cached_property
    def lp(self) -> np.ndarray:
        """Float32 [decisions], the policy's log-probs."""
        return self.logprobs[self.mask].numpy()

    @cached_property
    def lb(self) -> np.ndarray:
        """Float32 [decisions], the behaviour policy's log-probs."""
        return self.behavior_logprobs[self.mask].numpy()

    @cached_property
    def lr(self) -> np.ndarray | None:
        """Float32 [decisions], the initial model's log-probs, where the rows have them."""
        return None if self.reference_logprobs is None else self.reference_logprobs[self.mask].numpy()

    @cached_property
    def log_ratio(self) -> np.ndarray:
        """Float32 [decisions], not clipped."""
        return self.lp - (self.lr if self.ratio == "reference" and self.lr is not None else self.lb)

    @cached_property
    def fallen(self) -> np.ndarray:
        """Float32 [decisions of negative examples], nats below where ``negative_floor`` counts from."""
        start = self.lb if self.lr is None else self.lr
        return (start - self.lp)[self.reward[self.segment] < 0]

    def means(self, values: np.ndarray) -> np.ndarray:
        """Float64 [N]: of the values [decisions] of each trajectory; 0 where it has no decision."""
        sums = np.bincount(self.segment, values.astype(np.float64), minlength=len(self.reward))
        return sums / np.maximum(self.num_decisions, 1)

    def alignment(self) -> Alignment:
        """Whether the two log-probs are about the same tokens."""
        return read_alignment(
            alignment_sums(self.logprobs, self.behavior_logprobs, self.mask, self.cu_seqlens)
        )


@dataclass(frozen=True)
class Weights:
    """The weights of a pack's decisions under one setting.

    Attributes:
        config: the setting.
        weight: float32 [decisions].
        statistics: the means and shares that training logs as ``pear/...``, over all trajectories.
        positive, negative: the same over trajectories of reward >= 0, and below; None where there are none.
        effective_sample_size: float32 [N], share of each trajectory's decisions that count.
        content: what the weights say beyond a decision's place: the standard deviation of their logarithm among
            decisions that are as far from the end (``variant: sequence``: among responses as long).
    """

    config: PearConfig
    weight: np.ndarray
    statistics: dict[str, float]
    positive: dict[str, float] | None
    negative: dict[str, float] | None
    effective_sample_size: np.ndarray
    content: float

    def by_sign(self) -> list[tuple[str, dict[str, float]]]:
        """(name, statistics) of all trajectories and, if some are negative examples, of both kinds."""
        groups = [("all", self.statistics)]
        if self.negative is not None:
            groups += [("reward at least 0", self.positive)] if self.positive is not None else []
            groups.append(("negative examples", self.negative))
        return groups


def make_pack(
    trajectories: Sequence[Trajectory], policy_logprobs: Sequence[np.ndarray] | None, ratio: str = "behavior"
) -> Pack:
    """Collates trajectories, at least one, and the policy's log-probs alike.

    ``policy_logprobs`` are a float32 [n] each, aligned with ``input_ids``; None = those of the behaviour policy.
    """
    parts = []
    for start in range(0, len(trajectories), _PACK):
        part = list(trajectories[start : start + _PACK])
        positions = sum(len(t.input_ids) - 1 for t in part)
        batch = collate(part, [range(len(part))], positions)
        policy = batch
        if policy_logprobs is not None:
            own = policy_logprobs[start : start + _PACK]
            pairs = zip(part, own, strict=True)
            policy = collate(
                [replace(t, behavior_logprobs=lp) for t, lp in pairs], [range(len(part))], positions
            )
        parts.append((policy.behavior_logprobs, batch))
    reference = [b.reference_logprobs.flatten() for _, b in parts if b.reference_logprobs is not None]
    lengths = torch.cat([batch.cu_seqlens.diff() for _, batch in parts])
    return Pack(
        logprobs=torch.cat([lp.flatten() for lp, _ in parts]),
        behavior_logprobs=torch.cat([batch.behavior_logprobs.flatten() for _, batch in parts]),
        mask=torch.cat([batch.loss_mask.flatten() for _, batch in parts]),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        reward=np.concatenate([batch.reward.numpy() for _, batch in parts]),
        reference_logprobs=torch.cat(reference) if len(reference) == len(parts) else None,
        ratio=ratio,
    )


def weigh(pack: Pack, config: PearConfig) -> Weights:
    """The pack's weights, by the same op that training calls; without ``entropy_power``, as entropies are not known."""
    weights, statistics = _weigh(pack, pack.mask, config)
    negative = torch.from_numpy(pack.reward < 0).repeat_interleave(pack.cu_seqlens.diff().long())
    weight = weights[pack.mask].numpy()
    squares = pack.means(weight.astype(np.float64) ** 2)
    return Weights(
        config=config,
        weight=weight,
        statistics=statistics,
        positive=_weigh(pack, pack.mask & ~negative, config)[1] if (pack.reward >= 0).any() else None,
        negative=_weigh(pack, pack.mask & negative, config)[1] if (pack.reward < 0).any() else None,
        effective_sample_size=(pack.means(weight) ** 2 / np.maximum(squares, 1e-300)).astype(np.float32),
        content=_content(pack, weight, config),
    )


def _content(pack: Pack, weight: np.ndarray, config: PearConfig) -> float:
    length = pack.num_decisions[pack.segment]
    place, chosen = length - pack.position, weight > 0.0
    if config.variant == "sequence":  # one weight for all of a response
        place, chosen = length, chosen & (pack.position == 0)
    order = np.argsort(place[chosen], kind="stable")
    place, logarithm = place[chosen][order].astype(float), np.log(weight[chosen][order].astype(float))
    bins = int(np.clip(len(order) // 32, 1, 32))
    # A line in each of some bins of equal size: what the place alone would say.
    rest = [
        _off_the_line(x, y)
        for x, y in zip(np.array_split(place, bins), np.array_split(logarithm, bins), strict=True)
    ]
    return float(np.sqrt(np.mean(np.concatenate(rest) ** 2))) if len(order) else 0.0


def _off_the_line(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(), y - y.mean()
    spread = (x**2).sum()
    return y - x * ((x * y).sum() / spread) if spread else y


def _weigh(pack: Pack, mask: Tensor, config: PearConfig) -> tuple[Tensor, dict[str, float]]:
    weights, sums = importance_weights(
        pack.logprobs,
        pack.behavior_logprobs,
        mask,
        pack.cu_seqlens,
        config.model_copy(update={"entropy_power": 0.0}),
        reference_logprobs=pack.reference_logprobs,
        reward=torch.from_numpy(pack.reward),
    )
    means = {name: float(total / count) if count else 0.0 for name, (total, count) in sums.items()}
    return weights, means
