"""importance_weights: what each decision of a packed batch counts in the loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pear_megatron.config import PearConfig
from pear_megatron.ops.arguments import (
    LEAST_LOGPROB,
    require_behavior,
    require_config,
    require_everywhere,
    require_fine,
    require_mask,
    require_sampled,
    require_tensors,
)
from pear_megatron.ops.context_parallel import all_gather, check_shards, shard_positions
from pear_megatron.ops.suffix_sum import as_cu_seqlens
from pear_megatron.ops.weights import STATISTICS, pear_weights

_FULL_ENTROPY = math.log(20.0)  # nats: from there on a token counts in full


class _Pack(NamedTuple):
    """What the weights are made of, [T] each.

    ``base`` is what the ratios are taken against; ``reference`` is to be checked, and used or looked at elsewhere.
    """

    lp: Tensor
    base: Tensor
    mask: Tensor
    entropy: Tensor | None
    stopped: Tensor | None
    reference: Tensor | None


def statistic_names(config: PearConfig) -> tuple[str, ...]:
    """Names of a config's statistics, in their order: STATISTICS, and with ``negative_floor`` what it has stopped."""
    return STATISTICS if config.negative_floor is None else (*STATISTICS, "negative_stopped")


def importance_weights(
    logprobs: Tensor,
    behavior_logprobs: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    *,
    reference_logprobs: Tensor | None = None,
    reward: Tensor | None = None,
    entropy: Tensor | None = None,
    cp_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PEAR's weights for packed trajectories (docs/method.md, Weights). No gradient flows through them.

    With a context-parallel group each rank holds the zigzag chunks of every trajectory. One all-gather
    of 12 bytes a token, and of 4 for each of entropy, stopped negatives and references where they count, gives
    every rank the whole pack. Each computes all weights and keeps its own: the answer is bit for bit the one-rank
    answer for every setting, where exchanging totals would take a collective for each.

    Args:
        logprobs: [T] floating, log pi_theta of each token; any value off the mask.
        behavior_logprobs: [T] float32 or float64 (16 bits are refused), log pi_beta of the same tokens: on
            decisions finite and at most 0 (rounding up to 1e-5 is let pass), anything off the mask. May be None
            with ``variant: none`` or ``ratio: reference``.
        mask: [T] bool, True on decisions.
        cu_seqlens: [segments + 1] integer, boundaries of the trajectories of the whole pack.
        config: variant, clips, baseline, normaliser, factors.
        reference_logprobs: [T], log-probs of the same tokens under the initial model, as behavior_logprobs; needed
            with ``ratio: reference`` and ``dft_policy: reference``, and where ``negative_floor`` counts from, if they
            are given.
        reward: [segments] or [T]: ``negative_floor`` looks at its sign; None = nothing is negative.
        entropy: [T] floating, of the target policy in nats; needed with ``entropy_power``.
        cp_group: context-parallel ranks, zigzag layout; None = the tensors are whole.

    Returns:
        weights [T] float32, 0 off the mask, and statistics: name -> [sum, count] float32, to be added
        over micro-batches and data-parallel and context-parallel ranks (a rank of n context-parallel
        ones reports 1/n of the pack's sums and counts). Means: ``log_ratio``, ``weight`` (with its factors),
        ``effective_sample_size`` (per trajectory, in (0, 1], 0 if all weigh 0); shares of decisions:
        ``ratio_clipped_low``, ``ratio_clipped_high``, ``weight_at_floor``, ``weight_at_ceiling``; with
        ``negative_floor`` also ``negative_stopped``, a share of the decisions of negative examples.

    Raises:
        TypeError: what should be a tensor, or the config, is something else.
        ValueError: shapes, dtypes or devices that do not fit; a tensor that the config needs and that is not given;
            behaviour or reference log-probs of 16 bits, or that require a
            gradient; ones that are NaN, infinite (-inf too: no policy samples a token that it
            holds impossible) or positive on a decision; lengths that the context-parallel ranks cannot share.
            What needs a look at the values is a device-side assertion on CUDA, where reading them back would
            stall the stream. NaN in ``logprobs``, of a model that has diverged, is no error: it comes out as
            NaN.
    """
    weights, stats, _ = weights_and_statistics(
        logprobs,
        behavior_logprobs,
        mask,
        cu_seqlens,
        config,
        reference_logprobs=reference_logprobs,
        reward=reward,
        entropy=entropy,
        cp_group=cp_group,
    )
    return weights, dict(zip(statistic_names(config), stats, strict=True))


def reward_per_token(reward: Tensor, cu_seqlens: Tensor, tokens: int, cp_size: int) -> Tensor:
    """[segments], [T] or [B, S] -> [T] float32, of this rank's tokens.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another number of entries.
    """
    require_tensors(reward=reward)
    reward = reward.detach().to(device=cu_seqlens.device, dtype=torch.float32).flatten()
    segments = cu_seqlens.numel() - 1
    if reward.numel() == tokens and tokens != segments:
        return reward
    if reward.numel() != segments:
        raise ValueError(
            f"reward has {reward.numel()} entries; give one per trajectory ({segments}) or per token ({tokens})"
        )
    lengths, whole = cu_seqlens.diff(), tokens * cp_size
    good = (lengths >= 0) & (cu_seqlens.narrow(0, segments, 1) == whole)
    require_everywhere(good, "cu_seqlens", f"must not fall, and end at the number of tokens {whole}")
    return reward.repeat_interleave(lengths // cp_size, output_size=tokens)


def weights_and_statistics(
    logprobs: Tensor,
    behavior_logprobs: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    *,
    reference_logprobs: Tensor | None = None,
    reward: Tensor | None = None,
    entropy: Tensor | None = None,
    cp_group: torch.distributed.ProcessGroup | None = None,
    source: Tensor | None = None,
    num_sources: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``importance_weights`` whose statistics are also taken apart by source, without another collective.

    Args:
        logprobs, behavior_logprobs, mask, cu_seqlens, config, reference_logprobs, reward, entropy, cp_group: as in
            importance_weights.
        source: [segments] int64, below ``num_sources``; None with ``num_sources`` 0.
        num_sources: 0 = the statistics of sources are not wanted.

    Returns:
        weights [T] float32; statistics [n, 2] float32 (a sum and a count per statistic_names(config));
        [num_sources, n, 2].

    Raises:
        ValueError, TypeError: as importance_weights.
    """
    require_config(config)
    require_tensors(logprobs=logprobs)
    device = logprobs.device
    require_mask(mask, device)
    require_behavior(
        behavior_logprobs,
        device,
        config,
        reference_logprobs=reference_logprobs,
        has_reward=reward is not None,
    )
    require_fine("logprobs", logprobs)
    tensors = {"behavior_logprobs": behavior_logprobs, "mask": mask, "reference_logprobs": reference_logprobs}
    for name, x in tensors.items():
        if logprobs.dim() != 1 or (x is not None and x.shape != logprobs.shape):
            raise ValueError(
                f"{name} has shape {None if x is None else tuple(x.shape)} and logprobs {tuple(logprobs.shape)}; both "
                "must be [T], flat over the packed tokens"
            )
    cu = as_cu_seqlens(cu_seqlens, device)
    lp = logprobs.detach().float().contiguous()
    mask = mask.contiguous()
    against_reference = config.ratio == "reference"  # then they are there
    base = reference_logprobs if against_reference else behavior_logprobs
    if base is None:  # the weights are 1; NaN of a diverged model is no bad data
        base = lp.nan_to_num(nan=0.0).clamp(LEAST_LOGPROB, 0.0)
    base = base.float().contiguous()

    ranks = 1 if cp_group is None else cp_group.size()
    if ranks > 1:
        check_shards(cu, ranks, "zigzag", lp.numel())
    stopped = negative = reference = None
    if config.negative_floor is not None and reward is not None:
        start = behavior_logprobs if reference_logprobs is None else reference_logprobs
        assert start is not None
        negative = mask & (reward_per_token(reward, cu, lp.numel(), ranks) < 0)
        stopped = negative & (lp < start.float() - config.negative_floor)
    if reference_logprobs is not None and (config.needs_reference or stopped is not None):
        reference = base if against_reference else reference_logprobs.float()
    if config.entropy_power:
        entropy = _checked_entropy(entropy, lp, config)
    pack = _Pack(lp, base, mask, entropy if config.entropy_power else None, stopped, reference)
    positions = None if ranks == 1 else shard_positions(cu, ranks, "zigzag", lp.numel())  # [ranks, T]
    if positions is not None and cp_group is not None:
        pack = _gathered(pack, positions, cp_group)
    if pack.reference is not None:  # of the whole pack, so that all ranks raise
        require_sampled("reference_logprobs", pack.reference, pack.mask)
    factor = _factor(pack, config)
    weights, stats = _weigh(pack, factor, cu, config)
    by_source = _by_source(pack, factor, cu, config, source, num_sources)
    if positions is not None and cp_group is not None:
        weights, stats, by_source = weights[positions[cp_group.rank()]], stats / ranks, by_source / ranks
    if config.negative_floor is not None:
        pairs = _stopped_by_source(stopped, negative, cu.diff() // ranks, source, num_sources, stats)
        stats = torch.cat([stats, pairs[:1]])
        by_source = torch.cat([by_source, pairs[1:, None]], dim=1)
    return weights, stats, by_source


def _checked_entropy(entropy: Tensor | None, lp: Tensor, config: PearConfig) -> Tensor:
    """[T] float32."""
    if entropy is None:
        raise ValueError(
            f"entropy_power {config.entropy_power:g} needs entropy, that of the target policy at each token; "
            "entropy_power 0 does without"
        )
    require_tensors(lp.device, entropy=entropy)
    if entropy.shape != lp.shape:
        raise ValueError(
            f"entropy has shape {tuple(entropy.shape)} and logprobs {tuple(lp.shape)}; give one per token"
        )
    return entropy.detach().float()


def dft_factor(lp: Tensor, reference_logprobs: Tensor | None, config: PearConfig) -> Tensor:
    """[T] float32, DFT's factor (docs/method.md, Factors), without a gradient; NaN stays NaN."""
    judge = lp
    if config.dft_policy == "reference":
        assert reference_logprobs is not None
        judge = reference_logprobs
    floor = math.log(config.dft_floor) if config.dft_floor else -math.inf
    return (judge.detach().float().clamp_min(floor) * config.dft_power).exp()


def _factor(pack: _Pack, config: PearConfig) -> Tensor | None:
    """[T] float32, what weights are multiplied by (docs/method.md, Factors), or None for 1; NaN of lp stays NaN.

    Taken of the whole pack: vectorised ``exp`` rounds otherwise at another place in a tensor.
    """
    factor = None
    if config.dft_power and config.base_loss == "nll":
        factor = dft_factor(pack.lp, pack.reference, config)
    if pack.entropy is not None:
        share = (pack.entropy / _FULL_ENTROPY).clamp(0.0, 1.0) ** config.entropy_power
        factor = share if factor is None else factor * share
    if pack.stopped is not None:
        factor = (~pack.stopped).float() if factor is None else factor.masked_fill(pack.stopped, 0.0)
    return factor


def _gathered(pack: _Pack, positions: Tensor, cp_group: torch.distributed.ProcessGroup) -> _Pack:
    """This rank's [T] each -> [ranks * T], the whole pack in order, on every rank."""
    rows = {id(x): x for x in pack if x is not None}  # one may stand for two
    shards = all_gather(torch.stack([x.float() for x in rows.values()]), cp_group)  # [ranks, rows, T]
    whole = shards.new_empty((len(rows), positions.numel()))
    whole[:, positions.flatten()] = shards.transpose(0, 1).flatten(1)
    row = {key: whole[i].to(x.dtype) for i, (key, x) in enumerate(rows.items())}
    lp, base, mask = (row[id(x)] for x in pack[:3])
    return _Pack(lp, base, mask, *(None if x is None else row[id(x)] for x in pack[3:]))


def _weigh(pack: _Pack, factor: Tensor | None, cu: Tensor, config: PearConfig) -> tuple[Tensor, Tensor]:
    """pear_weights of the whole pack; under ``control`` each decision has another's weight, and its own factor.

    The order is drawn from the data, which all tensor-parallel ranks have alike. This waits for the device.
    """
    lp, base, mask = pack[:3]
    weights, stats = pear_weights(lp, base, mask, cu, config, factor)
    if config.control == "none":
        return weights, stats
    if factor is not None:
        weights, _ = pear_weights(lp, base, mask, cu, config)
    seed = int(base[mask].double().sum().abs() * 1e6) % 2**31
    order = torch.randperm(int(mask.sum()), generator=torch.Generator().manual_seed(seed)).to(weights.device)
    own = weights[mask]
    chosen = own[order]
    if config.control == "shuffled_by_place":
        place = _distance_to_the_end(mask, cu)[mask]
        chosen = torch.empty_like(own)
        chosen[place.argsort(stable=True)] = own[order[place[order].argsort(stable=True)]]
    shuffled = weights.masked_scatter(mask, chosen)
    return shuffled if factor is None else (shuffled * factor).where(mask, 0.0), stats


def _distance_to_the_end(mask: Tensor, cu: Tensor) -> Tensor:
    """[T] int64: how many decisions of its trajectory come after each token."""
    upto = torch.nn.functional.pad(mask.cumsum(0), (1, 0))  # [T + 1]
    return upto[cu[1:]].repeat_interleave(cu.diff(), output_size=mask.numel()) - upto[1:]


def _by_source(
    pack: _Pack,
    factor: Tensor | None,
    cu: Tensor,
    config: PearConfig,
    source: Tensor | None,
    num_sources: int,
) -> Tensor:
    """[num_sources, 7, 2]: statistics of the whole pack's trajectories of each source."""
    lp, base, mask = pack[:3]
    if source is None or not num_sources:
        return lp.new_zeros((0, len(STATISTICS), 2))
    of_token = source.repeat_interleave(cu.diff(), output_size=lp.numel())
    return torch.stack(
        [pear_weights(lp, base, mask & (of_token == s), cu, config, factor)[1] for s in range(num_sources)]
    )


def _stopped_by_source(
    stopped: Tensor | None,
    negative: Tensor | None,
    lengths: Tensor,
    source: Tensor | None,
    num_sources: int,
    like: Tensor,
) -> Tensor:
    """[1 + num_sources, 2]: how many decisions of negative examples have stopped, of how many; all first.

    Args:
        stopped, negative: [T] bool, this rank's tokens; None = no rewards are known.
        lengths: [segments], this rank's tokens of each.
        source, num_sources: as in weights_and_statistics.
        like: its dtype and device are the result's.
    """
    groups = num_sources if source is not None else 0
    if stopped is None or negative is None:
        return like.new_zeros((1 + groups, 2))
    both = torch.stack([stopped, negative])  # [2, T]
    counts = [both.sum(1)]
    if source is not None:
        of_token = source.repeat_interleave(lengths, output_size=stopped.numel())
        counts += [(both & (of_token == s)).sum(1) for s in range(groups)]
    return torch.stack(counts).to(like)
