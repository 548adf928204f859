"""Log-probabilities straight from hidden states: the output layer's GEMM in chunks of tokens, and no logits.

Whole logits grow with the sequence: 32 k tokens x 152 k columns of bfloat16 are 10 GB. Here one buffer of
``chunk_tokens`` rows is used again and again. Forward keeps the row sums that it found (4 bytes a token, and 4 k
with the KL of a top-k), so that backward, which makes each chunk's logits a second time, needs no reduction and no
collective over the vocabulary: three GEMMs become four, and memory no longer depends on the number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pear_megatron.ops.arguments import require_mask, require_target, require_tensors
from pear_megatron.ops.rows import gather_ranks, vocab_shard
from pear_megatron.ops.statistics import (
    Tail,
    TokenPass,
    TokenStatistics,
    TopK,
    checked_tail,
    checked_topk,
    differentiable,
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    chunk_tokens: int,
    mask: Tensor | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    reduce_hidden_gradient: bool = True,
) -> Tensor:
    """``vocab_parallel_logprob(hidden @ weight.T, target)`` without ever holding all of the logits.

    The weight's gradient is summed over chunks in float32: into ``weight.main_grad`` where there is one of
    float32 (Megatron's DDP; ``grad_added_to_main_grad`` then tells its hook, as Megatron's own fused layer
    does), otherwise in a float32 tensor that is rounded once to ``weight.grad``. Differentiable once.

    Args:
        hidden: [T, H] float32, bfloat16 or float16, the output layer's input; alike on every rank of tp_group.
        weight: [V_local, H] of the same dtype; rank r of n holds the rows [r * V_local, (r + 1) * V_local).
        target: [T] int64, global token ids; anything off the mask.
        chunk_tokens: rows of logits that exist at a time.
        mask: [T] bool, True = wanted. Other rows give 0 and get gradient 0.
        tp_group: the ranks that share the vocabulary; None = the vocabulary is whole.
        vocab_size: number of real tokens; rows of the weight from there on are padding.
        reduce_hidden_gradient: sum the gradient of ``hidden`` over tp_group, as ColumnParallelLinear does;
            False for a caller whose own backward does it (sequence parallelism's reduce-scatter).

    Returns:
        [T] float32 log-probabilities.

    Raises:
        TypeError: what should be a tensor is something else.
        ValueError: shapes, dtypes or devices that do not fit.
        IndexError: see vocab_parallel_logprob.
    """
    return linear_statistics(
        hidden,
        weight,
        target,
        chunk_tokens=chunk_tokens,
        mask=mask,
        tp_group=tp_group,
        vocab_size=vocab_size,
        reduce_hidden_gradient=reduce_hidden_gradient,
    ).logprob


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    chunk_tokens: int,
    topk: TopK | None = None,
    tail: Tail = "none",
    entropy: bool = False,
    mask: Tensor | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    reduce_hidden_gradient: bool = True,
) -> TokenStatistics:
    """linear_logprob, and from the same chunks the KL and the entropy where they are asked for.

    Args:
        hidden, weight, target, chunk_tokens, mask, tp_group, vocab_size, reduce_hidden_gradient: as in linear_logprob.
        topk, tail, entropy: as in vocab_parallel_statistics, [T, k].

    Returns:
        What was asked for, each [T] float32.

    Raises:
        TypeError, ValueError, IndexError: see linear_logprob and vocab_parallel_topk_kl.
    """
    require_tensors(hidden=hidden)
    require_tensors(hidden.device, weight=weight)
    require_target(target, hidden.device)
    if mask is not None:
        require_mask(mask, hidden.device)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [T, H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; give both in one dtype")
    for name, x in (("target", target), ("mask", mask)):
        if x is not None and x.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but hidden {tuple(hidden.shape)} wants [T]")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be 1 or more, got {chunk_tokens}")
    if topk is not None:
        topk = checked_topk(topk, target.shape, hidden.device)
    wanted = TokenPass(
        target.contiguous(),
        None if mask is None else mask.contiguous(),
        topk,
        checked_tail(tail) == "bucket",
        entropy,
        vocab_shard(weight.shape[0], vocab_size, tp_group, "rows of the weight"),
    )
    found = _LinearStatistics.apply(
        hidden.contiguous(), weight, wanted, tp_group, chunk_tokens, reduce_hidden_gradient
    )
    return TokenStatistics(*found)


class _LinearStatistics(torch.autograd.Function):
    """hidden [T, H], weight [V_local, H] -> TokenStatistics; saves its inputs, [T] vectors and k numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        wanted: TokenPass,
        tp_group: torch.distributed.ProcessGroup | None,
        chunk_tokens: int,
        reduce_hidden_gradient: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.reduce_group = None
        if tp_group is not None and tp_group.size() > 1:
            ctx.reduce_group = tp_group if reduce_hidden_gradient else None
        stats = hidden.new_empty((hidden.shape[0], wanted.width), dtype=torch.float32)
        for rows, logits in chunks_of_logits(hidden, weight, chunk_tokens):
            stats[rows] = wanted.forward(logits, rows)
        found, kept = wanted.combine(gather_ranks(stats, tp_group))
        ctx.save_for_backward(hidden, weight, *kept, *wanted.tensors())
        ctx.wanted, ctx.kept, ctx.chunk_tokens = wanted, len(kept), chunk_tokens
        return differentiable(ctx, found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, kl_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, *saved = ctx.saved_tensors
        kept = saved[: ctx.kept]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad = grad.float().contiguous()
        kl_grad = None if kl_grad is None else kl_grad.float().contiguous()
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        accumulator = WeightGradient(weight) if wants_weight else None
        for rows, logits in chunks_of_logits(hidden, weight, ctx.chunk_tokens):
            ctx.wanted.backward(logits, kept, grad, kl_grad, rows, inplace=True)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if accumulator is not None:
                accumulator.add_product(logits.t(), hidden[rows])
        if grad_hidden is not None and ctx.reduce_group is not None:
            torch.distributed.all_reduce(grad_hidden, group=ctx.reduce_group)
        grad_weight = accumulator.gradient() if accumulator is not None else None
        return grad_hidden, grad_weight, None, None, None, None


def chunks_of_logits(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [rows, V_local]); the logits are good until the next chunk is asked for."""
    tokens = hidden.shape[0]
    buffer = hidden.new_empty((min(chunk_tokens, tokens), weight.shape[0]))
    for start in range(0, tokens, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, tokens))
        logits = buffer[: rows.stop - start]
        torch.mm(hidden[rows], weight.t(), out=logits)
        yield rows, logits


class WeightGradient:
    """The sum over chunks of a weight's gradient, in float32."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        watched = hasattr(weight, "grad_added_to_main_grad")  # by Megatron's hook
        self.into_main_grad = watched and main_grad is not None and main_grad.dtype == torch.float32
        if main_grad is not None and self.into_main_grad:
            self.total = main_grad
        else:
            self.total = torch.zeros_like(weight, dtype=torch.float32)
        self.fused = adds_products_in_float32(weight.device, weight.dtype)

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """total += a @ b, for a [V_local, rows] and b [rows, H]."""
        if self.total.dtype == a.dtype:
            self.total.addmm_(a, b)
        elif self.fused:
            torch.ops.aten.addmm.dtype_out(self.total, a, b, torch.float32, out=self.total)
        else:
            self.total.add_(a @ b)

    def gradient(self) -> Tensor:
        """What autograd gets for the weight."""
        if not self.into_main_grad:
            return self.total.to(self.weight.dtype)
        # Megatron's hook reads the flag, and wants a tensor all the same: it adds it where the weight is the
        # embedding's as well (zero_out_wgrad), whose gradient autograd has then put in.
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.zeros_like(self.weight)


@functools.cache
def adds_products_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can add a product of 16-bit matrices to a float32 one without rounding it before."""
    if device.type == "cpu" or dtype == torch.float32 or not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    a, total = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, torch.float32, out=total)
    except (RuntimeError, NotImplementedError):  # torch before it had, or took, a float32 summand
        return False
    return True
