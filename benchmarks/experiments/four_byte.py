"""The output layer in four bytes of traffic per logit instead of six: an experiment, not in the package.

Forward writes ``e = exp(x - local max)`` over the logits in the pass that reduces them. The gradient of a logit,
``g (onehot - softmax)``, is then ``s e`` with one number a row, ``s = -g exp(local max - logsumexp)``, and what
multiplies rows does not touch the vocabulary: in the weight's gradient it scales the rows of the hidden states, in the
hidden states' gradient the rows of the result.

The target's column is 0 in ``e`` and a term of its own, a gather and a scatter-add with the factor
``g (1 - p) = -g expm1(logprob)``: taken as a difference ``1 - p`` of a bfloat16 ``p``, it would be wrong by 2^-9 where
the model is sure of the token and the true gradient is near zero.

Under tensor parallelism the local maximum may be far below the global one. Then ``s`` is small, but a row factor:
bfloat16 has float32's range, and below exp(-87) the whole row of that rank vanishes in the softmax as well. (float16
would lose it at 6e-8; the scheme is for bfloat16 and float32.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pear_megatron.ops.context_parallel import all_gather
from pear_megatron.ops.library import ops


def exp_forward_(
    logits: Tensor, target: Tensor, mask: Tensor | None, vocab_start: int, vocab_size: int
) -> Tensor:
    """torch.ops.pear_megatron.statistics_forward's statistics [T, 3], and e written over the logits.

    e is 0 in rows off the mask, in padded columns and at the target. This is the definition, in plain torch;
    on a GPU the kernel of four_byte_kernel.py does the same.
    """
    if logits.device.type == "cuda":
        from experiments.four_byte_kernel import exp_forward_kernel_

        return exp_forward_kernel_(logits, target, mask, vocab_start, vocab_size)
    stats = ops.statistics_forward(logits, target, mask, vocab_start, vocab_size)
    local_max = stats[:, 0]
    finite = local_max.where(local_max > -torch.inf, 0.0)  # rows off the mask, shards of padding alone
    e = torch.exp(logits.float() - finite[:, None])
    columns = torch.arange(vocab_start, vocab_start + logits.shape[1], device=logits.device)
    zero = (columns >= vocab_size) | (columns == target[:, None])
    if mask is not None:
        zero |= ~mask[:, None]
    logits.copy_(e.masked_fill_(zero, 0.0))
    return stats


class _FourByteLogprob(torch.autograd.Function):
    """hidden [T, H], weight [V_local, H] -> logprob [T]; keeps e [T, V_local] where logits would be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        mask: Tensor | None,
        tp_group: torch.distributed.ProcessGroup | None,
        vocab_size: int,
    ) -> Tensor:
        columns = weight.shape[0]
        start = 0 if tp_group is None else tp_group.rank() * columns
        e = hidden @ weight.t()  # logits, for a moment
        stats = exp_forward_(e, target, mask, start, vocab_size)
        of_ranks = stats[None] if tp_group is None else all_gather(stats, tp_group)
        logprob, normalizer, *_ = ops.statistics_combine(of_ranks, mask, vocab_size)
        here = (target >= start) & (target < start + columns)
        if mask is not None:
            here &= mask
        ctx.save_for_backward(hidden, weight, (target - start).where(here, 0), here, e)
        ctx.rows = ((stats[:, 0] - normalizer[:, 0]) - normalizer[:, 1], logprob)
        ctx.tp_group, ctx.mask = tp_group, mask
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, column, here, e = ctx.saved_tensors
        below, logprob = ctx.rows
        scale = -grad * below.exp()  # [T]; exp(-inf) = 0 for a shard without a token
        at_target = (-grad * torch.expm1(logprob)).where(here, 0.0)  # [T]
        if ctx.mask is not None:
            scale = scale.where(ctx.mask, 0.0)
        grad_hidden = (e @ weight).mul_(scale[:, None])
        grad_hidden.add_(at_target[:, None] * weight[column])
        grad_weight = (e.t() @ (scale[:, None] * hidden).to(e.dtype)).float()
        grad_weight.index_add_(0, column, at_target[:, None] * hidden)
        if ctx.tp_group is not None:
            torch.distributed.all_reduce(grad_hidden, group=ctx.tp_group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def four_byte_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """``vocab_parallel_logprob(hidden @ weight.T, target)``; arguments as linear_logprob has them."""
    ranks = 1 if tp_group is None else tp_group.size()
    return _FourByteLogprob.apply(
        hidden, weight, target, mask, tp_group, vocab_size or ranks * weight.shape[0]
    )
