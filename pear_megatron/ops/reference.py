"""docs/method.md in float64, written to be read: the answer every kernel is tested against.

One trajectory at a time, plain indexing, no tricks. ``decision`` is the list of positions on the mask.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from pear_megatron.config import PearConfig


def logprob(
    logits: Tensor, target: Tensor, mask: Tensor | None = None, vocab_size: int | None = None
) -> Tensor:
    """[T, V] logits, [T] target -> [T] float64 log-probabilities; 0 off the mask. Differentiable."""
    real = logits.double()[:, : vocab_size or logits.shape[1]]
    wanted = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    lp = real.log_softmax(-1).gather(1, target.where(wanted, 0).unsqueeze(1)).squeeze(1)
    return lp.where(wanted, 0.0)


def suffix_sum(x: Tensor, cu_seqlens: Tensor, exclusive: bool = True) -> Tensor:
    """[T] -> [T] float64: within each segment, the sum of what follows."""
    out = torch.zeros_like(x, dtype=torch.float64)
    bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        for t in range(start, end):
            out[t] = x[t + exclusive : end].double().sum()
    return out


def trajectory_log_weights(log_ratio: list[float], config: PearConfig) -> list[float]:
    """Log weight L_t of each decision, before its clip, from the clipped log ratios d_1..d_T."""
    T, g = len(log_ratio), math.log(config.gamma)
    if config.variant == "none":
        return [0.0] * T
    if config.variant == "sequence":
        return [math.fsum(log_ratio)] * T
    block = 1 if config.variant == "token" else config.block_size
    log_weight = []
    for t in range(T):
        last_of_block = min((t // block + 1) * block, T) - 1
        log_weight.append(math.fsum(d + g for d in log_ratio[last_of_block + 1 :]))
    return log_weight


def weights(
    logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor, config: PearConfig
) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """[T] inputs -> weights [T] float64 and (sum, count) statistics (docs/method.md, Weights)."""
    out = torch.zeros(logprobs.shape, dtype=torch.float64)
    sums = dict.fromkeys(
        (
            "log_ratio",
            "ratio_clipped_low",
            "ratio_clipped_high",
            "weight_at_floor",
            "weight_at_ceiling",
            "weight",
            "effective_sample_size",
        ),
        0.0,
    )
    decisions = trajectories = 0
    bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        decision = [t for t in range(start, end) if mask[t]]
        if not decision:
            continue
        raw = [float(logprobs[t].double() - behavior_logprobs[t].double()) for t in decision]
        mean = math.fsum(raw) / len(raw) if config.baseline == "sequence_mean" else 0.0
        low, high = config.log_ratio_clip
        centred = [d - mean for d in raw]
        log_weight = trajectory_log_weights([min(max(d, low), high) for d in centred], config)
        floor, ceiling = config.log_weight_clip
        w = [math.exp(min(max(L, floor), ceiling)) for L in log_weight]
        if config.variant == "none":
            w = [1.0] * len(w)
        if config.normalize == "sequence":
            w = [x * len(w) / math.fsum(w) for x in w]
        out[decision] = torch.tensor(w, dtype=torch.float64)

        decisions += len(decision)
        trajectories += 1
        sums["log_ratio"] += math.fsum(raw)
        sums["ratio_clipped_low"] += sum(d < low for d in centred)
        sums["ratio_clipped_high"] += sum(d > high for d in centred)
        sums["weight_at_floor"] += sum(floor >= L for L in log_weight)
        sums["weight_at_ceiling"] += sum(ceiling <= L for L in log_weight)
        sums["weight"] += math.fsum(w)
        sums["effective_sample_size"] += math.fsum(w) ** 2 / (len(w) * math.fsum(x * x for x in w))
    counts = {name: float(trajectories if name == "effective_sample_size" else decisions) for name in sums}
    return out, {name: (sums[name], counts[name]) for name in sums}


def loss_sum(
    logits: Tensor,
    target: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    reward: Tensor | None = None,
    vocab_size: int | None = None,
    token_weights: Tensor | None = None,
    normalization: str = "token",
) -> Tensor:
    """The summed loss of a pack, float64, differentiable in the logits (docs/method.md, Loss).

    With ``normalization="trajectory"`` it is the sum over trajectories of the mean over their decisions.
    """
    lp = logprob(logits, target, mask, vocab_size)
    w, _ = weights(lp.detach(), behavior_logprobs, mask, cu_seqlens, config)
    r = torch.ones(cu_seqlens.numel() - 1, dtype=torch.float64) if reward is None else reward.double()
    r = torch.where(r < 0, r * config.negative_scale, r).repeat_interleave(cu_seqlens.diff())
    if token_weights is not None:
        r = r * token_weights.double().where(mask, 0.0)
    terms = -(r * w * lp)
    if normalization == "token":
        return terms.sum()
    return sum(
        (terms[a:b].sum() / mask[a:b].sum() for a, b in pairwise(cu_seqlens.tolist()) if mask[a:b].any()),
        start=terms.new_zeros(()),
    )
