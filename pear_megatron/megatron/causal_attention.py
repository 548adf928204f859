"""Causal attention over packed segments in memory linear in their length: torch's own kernels, no S x S mask.

Which kernel: on a GPU that flash attention takes (bfloat16 or float16, compute capability 8.0), one launch of
``torch.nn.attention.varlen`` over all segments, where torch's has a window and groups of heads. Everywhere else, one
``scaled_dot_product_attention`` a segment: flash attention on the CPU, the memory-efficient kernel for float32 on
a GPU. torch's third way, which writes the scores of every pair of positions, is never allowed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None  # type: ignore[assignment]

_LINEAR = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_LARGEST_HEAD = 256  # of flash attention


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Attention of B sequences of the same length: position p sees positions 0 to p.

    Args:
        query: [S, B, H, D].
        key, value: [S, B, G, D], H divisible by G: a key-value head serves H / G query heads, and is not copied.
        scale: of the scores before the softmax.

    Returns:
        [S, B, H, D].

    Raises:
        RuntimeError: torch has no kernel that is linear in S for these tensors.
    """
    length, batch, heads, size = query.shape
    groups = key.shape[2]
    if query.is_cuda and heads != groups:
        # The memory-efficient kernel knows no groups: they stand as the batch, and keys are expanded in place.
        query = query.reshape(length, batch * groups, heads // groups, size)
        key, value = (
            x.reshape(length, batch * groups, 1, size).expand(-1, -1, heads // groups, -1)
            for x in (key, value)
        )
    with sdpa_kernel(_LINEAR):
        out = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
    return out.permute(2, 0, 1, 3).reshape(length, batch, heads, size)


def packed_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float
) -> Tensor:
    """Attention in which every segment of a packed row sees itself alone.

    Args:
        query: [T, H, D].
        key, value: [T, G, D], H divisible by G (see ``causal_attention``).
        cu_seqlens: int32 [n + 1], the segments' ends; the last is T.
        max_seqlen: length of the longest segment.
        scale: of the scores before the softmax.

    Returns:
        [T, H, D].

    Raises:
        RuntimeError: torch has no kernel that is linear in T for these tensors.
    """
    if _takes_all_segments_at_once(query, key):
        options: dict[str, Any] = {} if query.shape[1] == key.shape[1] else {"enable_gqa": True}
        out: Any = varlen_attn(
            *(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
            scale=scale,
            window_size=(-1, 0),  # causal
            **options,
        )
        return out
    lengths = cu_seqlens.diff().tolist()
    segments = zip(*(x[:, None].split(lengths) for x in (query, key, value)), lengths, strict=True)
    return torch.cat([causal_attention(q, k, v, scale=scale)[:, 0] for q, k, v, n in segments if n])


def _takes_all_segments_at_once(query: Tensor, key: Tensor) -> bool:
    """Whether torch's varlen_attn takes these tensors."""
    if varlen_attn is None or not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    known = inspect.signature(varlen_attn).parameters  # 2.10 has no window, 2.11 no groups
    size = query.shape[-1]
    return (
        {"scale", "window_size"} <= known.keys()
        and (query.shape[1] == key.shape[1] or "enable_gqa" in known)
        and size % 8 == 0
        and size <= _LARGEST_HEAD
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
