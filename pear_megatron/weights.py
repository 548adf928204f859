"""importance_weights: what each decision of a packed batch counts in the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from pear_megatron.config import PearConfig
from pear_megatron.ops.arguments import require_behavior, require_config, require_mask, require_tensors
from pear_megatron.ops.context_parallel import all_gather, check_shards, shard_positions
from pear_megatron.ops.suffix_sum import as_cu_seqlens
from pear_megatron.ops.weights import STATISTICS, pear_weights


def importance_weights(
    logprobs: Tensor,
    behavior_logprobs: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    *,
    cp_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PEAR's weights for packed trajectories (docs/method.md, Weights). No gradient flows through them.

    With a context-parallel group each rank holds the zigzag chunks of every trajectory. One all-gather
    of 12 bytes a token gives every rank the whole pack, and each computes all weights and keeps its
    own: the answer is bit for bit the one-rank answer for every variant, baseline and normaliser,
    where exchanging totals would take a collective for each.

    Args:
        logprobs: [T] floating, log pi_theta of each token; any value off the mask.
        behavior_logprobs: [T] float32 or float64 (16 bits are refused), log pi_beta of the same tokens: on
            decisions finite and at most 0 (rounding up to 1e-5 is let pass), anything off the mask. May be None
            with ``variant: none``.
        mask: [T] bool, True on decisions.
        cu_seqlens: [segments + 1] integer, boundaries of the trajectories of the whole pack.
        config: variant, clips, baseline, normaliser.
        cp_group: context-parallel ranks, zigzag layout; None = the tensors are whole.

    Returns:
        weights [T] float32, 0 off the mask, and statistics: name -> [sum, count] float32, to be added
        over micro-batches and data-parallel and context-parallel ranks (a rank of n context-parallel
        ones reports 1/n of the pack's sums and counts). Means: ``log_ratio``, ``weight``,
        ``effective_sample_size`` (per trajectory, in (0, 1]); shares of decisions:
        ``ratio_clipped_low``, ``ratio_clipped_high``, ``weight_at_floor``, ``weight_at_ceiling``.

    Raises:
        TypeError: what should be a tensor, or the config, is something else.
        ValueError: shapes, dtypes or devices that do not fit; behaviour log-probs of 16 bits, or that require a
            gradient; behaviour log-probs that are NaN, infinite (-inf too: no policy samples a token that it
            holds impossible) or positive on a decision; lengths that the context-parallel ranks cannot share.
            What needs a look at the values is a device-side assertion on CUDA, where reading them back would
            stall the stream. NaN in ``logprobs``, of a model that has diverged, is no error: it comes out as
            NaN.
    """
    weights, stats, _ = weights_and_statistics(
        logprobs, behavior_logprobs, mask, cu_seqlens, config, cp_group=cp_group
    )
    return weights, dict(zip(STATISTICS, stats, strict=True))


def weights_and_statistics(
    logprobs: Tensor,
    behavior_logprobs: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    *,
    cp_group: torch.distributed.ProcessGroup | None = None,
    source: Tensor | None = None,
    num_sources: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``importance_weights`` whose statistics are also taken apart by source, without another collective.

    Args:
        logprobs, behavior_logprobs, mask, cu_seqlens, config, cp_group: as in importance_weights.
        source: [segments] int64, below ``num_sources``; None with ``num_sources`` 0.
        num_sources: 0 = the statistics of sources are not wanted.

    Returns:
        weights [T] float32; statistics [7, 2] float32 (a sum and a count per STATISTICS); [num_sources, 7, 2].

    Raises:
        ValueError, TypeError: as importance_weights.
    """
    require_config(config)
    require_tensors(logprobs=logprobs)
    require_mask(mask, logprobs.device)
    require_behavior(behavior_logprobs, logprobs.device, config)
    if behavior_logprobs is None:  # the weights are 1; NaN of a diverged model is no bad data
        behavior_logprobs = logprobs.detach().float().nan_to_num(nan=0.0).clamp_max(0.0)
    tokens = logprobs.shape
    for name, x in (("behavior_logprobs", behavior_logprobs), ("mask", mask)):
        if logprobs.dim() != 1 or x.shape != tokens:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and logprobs {tuple(tokens)}; both must be [T], "
                "flat over the packed tokens"
            )
    cu = as_cu_seqlens(cu_seqlens, logprobs.device)
    lp = logprobs.detach().float().contiguous()
    lb = behavior_logprobs.float().contiguous()
    mask = mask.contiguous()

    if cp_group is None or cp_group.size() == 1:
        weights, stats = pear_weights(lp, lb, mask, cu, config)
        by_source = _by_source(lp, lb, mask, cu, config, source, num_sources)
        return _controlled(weights, lb, mask, config), stats, by_source

    ranks = cp_group.size()
    check_shards(cu, ranks, "zigzag", lp.numel())
    positions = shard_positions(cu, ranks, "zigzag", lp.numel())  # [ranks, T]
    shards = all_gather(torch.stack([lp, lb, mask.float()]), cp_group)  # [ranks, 3, T]
    whole = shards.new_empty((3, ranks * lp.numel()))
    whole[:, positions.flatten()] = shards.transpose(0, 1).flatten(1)
    lp, lb, mask = whole[0], whole[1], whole[2].bool()
    weights, stats = pear_weights(lp, lb, mask, cu, config)
    by_source = _by_source(lp, lb, mask, cu, config, source, num_sources)
    weights = _controlled(weights, lb, mask, config)
    return weights[positions[cp_group.rank()]], stats / ranks, by_source / ranks


def _by_source(
    lp: Tensor,
    lb: Tensor,
    mask: Tensor,
    cu: Tensor,
    config: PearConfig,
    source: Tensor | None,
    num_sources: int,
) -> Tensor:
    """[num_sources, 7, 2]: statistics of the whole pack's trajectories of each source."""
    if source is None or not num_sources:
        return lp.new_zeros((0, len(STATISTICS), 2))
    of_token = source.repeat_interleave(cu.diff(), output_size=lp.numel())
    return torch.stack(
        [pear_weights(lp, lb, mask & (of_token == s), cu, config)[1] for s in range(num_sources)]
    )


def _controlled(weights: Tensor, behavior_logprobs: Tensor, mask: Tensor, config: PearConfig) -> Tensor:
    """The weights, or those of the control experiment; [T] float32 each.

    The order is drawn from the data, which all tensor-parallel ranks have alike. This waits for the device.
    """
    if config.control == "none":
        return weights
    seed = int(behavior_logprobs[mask].double().sum().abs() * 1e6) % 2**31
    order = torch.randperm(int(mask.sum()), generator=torch.Generator().manual_seed(seed))
    shuffled = weights.clone()
    shuffled[mask] = weights[mask][order.to(weights.device)]
    return shuffled
