"""The forward kernel of the four-byte scheme, in Triton: reduce a row, then write exp(x - max) over it.

A row of 152 k bfloat16 columns is 304 KB: more than a multiprocessor's shared memory, less than its share of the L2
cache (132 rows at a time are 40 MB; an H100 has 50). So the row is read twice, the second time, as is hoped, from
L2, and memory sees two bytes read and two written. With TRITON_INTERPRET=1 it runs on the CPU, for the tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
_WARPS = 32  # one program on a multiprocessor at a time, or the rows in flight are more than L2


@triton.jit
def exp_rows(
    logits,
    target,
    mask,
    stats,
    row_stride,
    real_columns: tl.constexpr,
    columns: tl.constexpr,
    vocab_start,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row; stats [tokens, 3] f32: max, sum of exp(x - max), target logit (-inf if elsewhere)."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    wanted = True
    if HAS_MASK:
        wanted = tl.load(mask + row) != 0
    lane = tl.arange(0, BLOCK)
    if wanted:
        high = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for offset in range(0, real_columns, BLOCK):
            column = offset + lane
            x = tl.load(start + column, mask=column < real_columns, other=float("-inf")).to(tl.float32)
            new = tl.maximum(high, x)
            base = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is no number
            total = total * tl.exp(high - base) + tl.exp(x - base)
            high = new
        row_max = tl.max(high, axis=0)
        base = tl.where(row_max == float("-inf"), 0.0, row_max)
        row_sum = tl.sum(total * tl.exp(high - base), axis=0)
        at = tl.load(target + row) - vocab_start
        here = (at >= 0) & (at < real_columns)
        x_target = tl.load(start + at, mask=here, other=float("-inf")).to(tl.float32)
        tl.store(stats + 3 * row, row_max)
        tl.store(stats + 3 * row + 1, row_sum)
        tl.store(stats + 3 * row + 2, x_target)
        for offset in range(0, columns, BLOCK):
            column = offset + lane
            real = column < real_columns
            x = tl.load(start + column, mask=real, other=float("-inf")).to(tl.float32)
            e = tl.where(column == at, 0.0, tl.exp(x - base))
            tl.store(start + column, e.to(logits.dtype.element_ty), mask=column < columns)
    else:
        tl.store(stats + 3 * row, float("-inf"))
        tl.store(stats + 3 * row + 1, 0.0)
        tl.store(stats + 3 * row + 2, 0.0)
        for offset in range(0, columns, BLOCK):
            column = offset + lane
            zero = tl.zeros((BLOCK,), logits.dtype.element_ty)
            tl.store(start + column, zero, mask=column < columns)


def exp_forward_kernel_(
    logits: Tensor, target: Tensor, mask: Tensor | None, vocab_start: int, vocab_size: int
) -> Tensor:
    """four_byte.exp_forward_ by the kernel; logits [T, V] with contiguous rows. Returns stats [T, 3] f32."""
    tokens, columns = logits.shape
    stats = torch.empty(tokens, 3, dtype=torch.float32, device=logits.device)
    if tokens:
        exp_rows[(tokens,)](
            logits,
            target,
            target if mask is None else mask.view(torch.uint8),
            stats,
            logits.stride(0),
            max(0, min(columns, vocab_size - vocab_start)),
            columns,
            vocab_start,
            HAS_MASK=mask is not None,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return stats
