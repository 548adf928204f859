"""Suffix sums that never cross from one trajectory of a pack into the next."""

from __future__ import annotations

import torch
from torch import Tensor

from pear_megatron.ops.arguments import require_everywhere, require_tensors
from pear_megatron.ops.context_parallel import (
    Layout,
    all_gather,
    check_shards,
    chunk_owners,
    chunks_per_rank,
)
from pear_megatron.ops.library import ops


def as_cu_seqlens(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """cu_seqlens as the ops take it: int32, contiguous, on the tokens' device."""
    require_tensors(cu_seqlens=cu_seqlens)
    integers = not (cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool)
    if not integers or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            "cu_seqlens must be integers of shape [segments + 1], got "
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    cu = cu_seqlens.to(torch.int32)
    if cu_seqlens.element_size() > cu.element_size():
        require_everywhere(cu == cu_seqlens.long(), "cu_seqlens", "beyond the 2^31 - 1 tokens of a pack")
    return cu.to(device).contiguous()


def segmented_suffix_sum(
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    exclusive: bool = True,
    group: torch.distributed.ProcessGroup | None = None,
    layout: Layout = "contiguous",
) -> Tensor:
    """Per segment, the sum of x after each token (docs/method.md, Weights: step 2).

    With a group, every rank holds a shard of every segment and one all-gather of the chunks' totals
    (not of the tokens) makes the sums whole. No gradient flows through the result.

    Args:
        x: [T] float32, this rank's tokens.
        cu_seqlens: [segments + 1] integer, boundaries of the segments of the whole pack.
        exclusive: leave token t out of its own sum.
        group: the ranks that share the pack; None = x is whole.
        layout: which tokens of a segment rank r of n holds: chunk r of n (``contiguous``), or chunks r
            and 2n-1-r of 2n, joined (``zigzag``, Megatron's context parallelism).

    Returns:
        [T] float32, sums for this rank's tokens.

    Raises:
        TypeError: x or cu_seqlens is no tensor.
        ValueError: shapes, dtypes, cu_seqlens that do not end at T, lengths the ranks cannot share.
    """
    require_tensors(x=x)
    x = x.detach()
    cu = as_cu_seqlens(cu_seqlens, x.device)
    ranks = 1 if group is None else group.size()
    pieces = chunks_per_rank(layout)
    if group is None or ranks == 1:
        return ops.segmented_suffix_sum(x, cu, None, exclusive)
    check_shards(cu, ranks, layout, x.numel())

    # Each chunk is a segment of its own; what lies to its right in the trajectory comes in as carry.
    chunk_lengths = (cu.diff() // (ranks * pieces)).repeat_interleave(pieces)
    local_cu = torch.cat([cu.new_zeros(1), chunk_lengths.cumsum(0, dtype=torch.int32)])
    totals = ops.segment_sum(x, local_cu).view(-1, pieces)  # [segments, chunks per rank]
    everyone = all_gather(totals, group)  # [ranks, segments, chunks per rank]
    owners = torch.tensor(chunk_owners(ranks, layout), device=x.device)  # [ranks, chunks per rank]
    by_chunk = torch.empty((totals.shape[0], ranks * pieces), dtype=torch.float64, device=x.device)
    by_chunk[:, owners.flatten()] = everyone.permute(1, 0, 2).flatten(1).double()
    to_the_right = by_chunk.flip(1).cumsum(1).flip(1) - by_chunk
    carry = to_the_right[:, owners[group.rank()]].float().flatten().contiguous()
    return ops.segmented_suffix_sum(x, local_cu, carry, exclusive)
