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


def entropy(logits: Tensor, mask: Tensor | None = None, vocab_size: int | None = None) -> Tensor:
    """[T, V] logits -> [T] float64 entropy in nats; 0 off the mask."""
    lp = logits.double()[:, : vocab_size or logits.shape[1]].log_softmax(-1)
    h = -(lp.exp() * lp).nan_to_num(nan=0.0).sum(-1)  # a token of logit -inf adds nothing
    return h if mask is None else h.where(mask, 0.0)


def topk_kl(
    logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    mask: Tensor,
    tail: str = "none",
    vocab_size: int | None = None,
) -> Tensor:
    """[T, V] logits, [T, k] ids (-1 = none) and log q -> [T] float64 KL(q || pi), differentiable; 0 off the mask."""
    lp = logits.double()[:, : vocab_size or logits.shape[1]].log_softmax(-1)
    out = []
    for t in range(len(mask)):
        if not mask[t]:
            out.append(lp.new_zeros(()))
            continue
        entry = topk_ids[t] >= 0
        log_pi = lp[t, topk_ids[t, entry].long()]
        log_q = topk_logprobs[t, entry].double()
        if tail == "none":
            log_q = log_q - log_q.logsumexp(0)
        kl = (log_q.exp() * (log_q - log_pi)).sum()
        if tail == "bucket" and (rest := 1.0 - log_q.exp().sum()) > 0:
            outside = lp[t].index_fill(0, topk_ids[t, entry].long(), float("-inf"))
            kl = kl + rest * (rest.log() - outside.logsumexp(0).clamp_min(-80.0))
        out.append(kl)
    return torch.stack(out)


def dft_factor(logprobs: Tensor, config: PearConfig, reference_logprobs: Tensor | None = None) -> Tensor:
    """[T] -> [T] float64, DFT's factor (docs/method.md, Factors)."""
    judge = logprobs
    if config.dft_policy == "reference":
        assert reference_logprobs is not None
        judge = reference_logprobs
    return judge.detach().double().exp().clamp_min(config.dft_floor) ** config.dft_power


def weight_factor(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    config: PearConfig,
    reward: Tensor | None = None,
    entropy: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
) -> Tensor:
    """What each decision's weight is multiplied by, [T] float64 (docs/method.md, Factors); reward is [T] here."""
    lp = logprobs.detach().double()
    factor = torch.ones_like(lp)
    if config.base_loss == "nll":
        factor = dft_factor(lp, config, reference_logprobs)
    if config.entropy_power:
        assert entropy is not None
        factor = factor * (entropy.double() / math.log(20)).clamp_max(1.0) ** config.entropy_power
    if config.negative_floor is not None and reward is not None:
        start = behavior_logprobs if reference_logprobs is None else reference_logprobs
        stopped = (reward < 0) & (lp < start.double() - config.negative_floor)
        factor = factor.where(~stopped, 0.0)
    return factor


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
    if config.variant == "own":
        return log_ratio
    if config.variant == "sequence":
        total = math.fsum(log_ratio)
        return [total if config.sequence_scale == "sum" else config.tau * total / T] * T
    block = 1 if config.variant == "token" else config.block_size
    log_weight = []
    for t in range(T):
        last_of_block = min((t // block + 1) * block, T) - 1
        log_weight.append(math.fsum(d + g for d in log_ratio[last_of_block + 1 :]))
    return log_weight


def weights(
    logprobs: Tensor,
    denominator: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    factor: Tensor | None = None,
) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """[T] inputs -> weights [T] float64 and (sum, count) statistics (docs/method.md, Weights).

    ``denominator`` has the behaviour policy's log-probs, or with ``ratio: reference`` the reference's.
    """
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
        raw = [float(logprobs[t].double() - denominator[t].double()) for t in decision]
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
        if factor is not None:
            w = [x * float(factor[t]) for x, t in zip(w, decision, strict=True)]
        out[decision] = torch.tensor(w, dtype=torch.float64)

        decisions += len(decision)
        trajectories += 1
        sums["log_ratio"] += math.fsum(raw)
        sums["ratio_clipped_low"] += sum(d < low for d in centred)
        sums["ratio_clipped_high"] += sum(d > high for d in centred)
        sums["weight_at_floor"] += sum(floor >= L for L in log_weight)
        sums["weight_at_ceiling"] += sum(ceiling <= L for L in log_weight)
        sums["weight"] += math.fsum(w)
        squares = math.fsum(x * x for x in w)  # 0 where the factors are
        sums["effective_sample_size"] += math.fsum(w) ** 2 / (len(w) * squares) if squares else 0.0
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
    reference_logprobs: Tensor | None = None,
    behavior_topk: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The summed loss of a pack, float64, differentiable in the logits (docs/method.md, Loss).

    With ``normalization="trajectory"`` it is the sum over trajectories of the mean over their decisions.
    """
    lp = logprob(logits, target, mask, vocab_size)
    r = torch.ones(cu_seqlens.numel() - 1, dtype=torch.float64) if reward is None else reward.double()
    r = r.repeat_interleave(cu_seqlens.diff())
    h = entropy(logits, mask, vocab_size).detach()
    factor = weight_factor(lp, behavior_logprobs, config, r, h, reference_logprobs)
    denominator = behavior_logprobs
    if config.ratio == "reference":
        assert reference_logprobs is not None
        denominator = reference_logprobs
    w, _ = weights(lp.detach(), denominator, mask, cu_seqlens, config, factor)
    r = torch.where(r < 0, r * config.negative_scale, r)
    if token_weights is not None:
        r = r * token_weights.double().where(mask, 0.0)
    base = -lp
    if config.base_loss == "kl":
        assert behavior_topk is not None
        kl = topk_kl(logits, *behavior_topk, mask, config.kl_tail, vocab_size)
        base = dft_factor(lp, config, reference_logprobs) * base
        base = (1 - config.kl_weight) * base + config.kl_weight * kl
    terms = r * w * base
    if normalization == "token":
        return terms.sum()
    return sum(
        (terms[a:b].sum() / mask[a:b].sum() for a, b in pairwise(cu_seqlens.tolist()) if mask[a:b].any()),
        start=terms.new_zeros(()),
    )
