"""Where a context-parallel rank's tokens stand in the whole pack, computed on the device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# torch 2.13 renamed it and warns of the old name.
_all_gather = (
    getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
)

Layout = Literal["contiguous", "zigzag"]


def chunks_per_rank(layout: Layout) -> int:
    """Chunks of every segment that one rank holds: 1 (contiguous) or 2 (zigzag)."""
    if layout not in ("contiguous", "zigzag"):
        raise ValueError(f"layout must be 'contiguous' or 'zigzag', got {layout!r}")
    return 2 if layout == "zigzag" else 1


def chunk_owners(ranks: int, layout: Layout) -> list[list[int]]:
    """For each rank, the chunks it holds, in the order in which it holds them."""
    if chunks_per_rank(layout) == 1:
        return [[rank] for rank in range(ranks)]
    return [[rank, 2 * ranks - 1 - rank] for rank in range(ranks)]


def check_shards(cu_seqlens: Tensor, ranks: int, layout: Layout, local_tokens: int) -> None:
    """Every rank must hold equal chunks of every segment; checked where that costs no device sync."""
    if cu_seqlens.device.type != "cpu":
        return
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens must start at 0 and not decrease, got {_shorten(cu_seqlens)}")
    pieces = ranks * chunks_per_rank(layout)
    bad = (lengths % pieces != 0).nonzero().flatten()
    if bad.numel():
        segment = int(bad[0])
        raise ValueError(
            f"segment {segment} has {int(lengths[segment])} tokens, not divisible by {pieces} ({ranks} "
            f"context-parallel ranks, {layout} layout); pad each trajectory to a multiple of {pieces}"
        )
    if int(cu_seqlens[-1]) != ranks * local_tokens:
        raise ValueError(
            f"cu_seqlens are those of the whole pack and must end at {ranks * local_tokens} ({ranks} "
            f"context-parallel ranks x {local_tokens} tokens here), got {int(cu_seqlens[-1])}"
        )


def _shorten(cu_seqlens: Tensor) -> str:
    values = [str(value) for value in cu_seqlens[:8].tolist()]
    return f"[{', '.join(values)}{', ...' if cu_seqlens.numel() > 8 else ''}]"


def shard_positions(cu_seqlens: Tensor, ranks: int, layout: Layout, local_tokens: int) -> Tensor:
    """Positions in the whole pack of every rank's tokens.

    Args:
        cu_seqlens: [segments + 1] int32, of the whole pack.
        ranks: size of the context-parallel group.
        layout: ``contiguous`` or ``zigzag``.
        local_tokens: tokens each rank holds.

    Returns:
        [ranks, local_tokens] int64; no host synchronisation.
    """
    pieces = ranks * chunks_per_rank(layout)
    device = cu_seqlens.device
    cu = cu_seqlens.long()
    local_cu = cu // ranks
    token = torch.arange(local_tokens, device=device)
    segment = torch.searchsorted(local_cu[1:], token, right=True).clamp_max(cu.numel() - 2)
    offset = token - local_cu[segment]
    chunk_length = (cu.diff() // pieces)[segment].clamp_min(1)
    which, within = offset // chunk_length, offset % chunk_length
    owners = torch.tensor(chunk_owners(ranks, layout), device=device)  # [ranks, chunks per rank]
    chunk = owners[:, which.clamp(0, owners.shape[1] - 1)]  # [ranks, local_tokens]
    return cu[segment] + chunk * chunk_length + within


def all_gather(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """[...] of this rank -> [ranks, ...] of all."""
    # Flat, because gloo joins along the first dimension and knows no leading dimension of ranks.
    gathered = x.new_empty(group.size() * x.numel())
    _all_gather(gathered, x.reshape(-1), group=group)
    return gathered.view(group.size(), *x.shape)
