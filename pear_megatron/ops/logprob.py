"""Log-probability of each target token from vocabulary-sharded logits, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pear_megatron.ops.arguments import require_mask, require_target, require_tensors
from pear_megatron.ops.context_parallel import all_gather
from pear_megatron.ops.library import ops


class _VocabParallelLogprob(torch.autograd.Function):
    """logits [T, V_local] -> logprob [T]; the only saved tensors are the logits and [T] vectors."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        tp_group: torch.distributed.ProcessGroup | None,
        vocab_start: int,
        vocab_size: int,
        inplace_backward: bool,
    ) -> Tensor:
        stats = ops.logprob_forward(logits, target, mask, vocab_start, vocab_size)  # [3, T]
        logprob, normalizer = ops.logprob_combine(gather_ranks(stats, tp_group), mask)
        ctx.save_for_backward(logits, target, mask, normalizer)
        ctx.vocab_start, ctx.vocab_size, ctx.inplace = vocab_start, vocab_size, inplace_backward
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, mask, normalizer = ctx.saved_tensors
        args = (target, mask, normalizer, grad.float().contiguous(), ctx.vocab_start, ctx.vocab_size)
        if ctx.inplace:
            ops.logprob_backward_(logits, *args)
            # Whoever still wants these logits, a second backward included, gets an error, not gradients.
            torch.autograd.graph.increment_version(logits)
            grad_logits = logits
        else:
            grad_logits = ops.logprob_backward(logits, *args)
        return grad_logits, None, None, None, None, None, None


def gather_ranks(stats: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """This rank's statistics, [3, T] or [T, W] -> [ranks, ...]: the one collective, 12 bytes a token (4 W)."""
    if group is None or group.size() == 1:
        return stats.unsqueeze(0)
    return all_gather(stats, group)


class RowLayout:
    """Which token is which row. Leading dimensions go by falling stride, so that flattening the logits is a view:
    mcore's [s, b, v] comes to its users transposed to [b, s, v]."""

    def __init__(self, logits: Tensor) -> None:
        self.shape, strides = logits.shape[:-1], logits.stride()
        self.order = sorted(range(logits.dim() - 1), key=lambda d: (-strides[d], d))

    def rows(self, logits: Tensor) -> Tensor:
        """[..., V] -> [T, V], each row contiguous and with memory of its own (of an expanded tensor, a copy's)."""
        rows = logits.permute([*self.order, logits.dim() - 1]).reshape(-1, logits.shape[-1])
        count, columns = rows.shape
        whole = columns == 1 or rows.stride(1) == 1
        return rows if whole and (count == 1 or rows.stride(0) >= columns) else rows.contiguous()

    def flat(self, x: Tensor) -> Tensor:
        """[...] -> [T], or [..., k] -> [T, k]; contiguous."""
        rest = range(len(self.order), x.dim())
        return x.permute([*self.order, *rest]).reshape(-1, *(x.shape[d] for d in rest)).contiguous()

    def unflat(self, x: Tensor) -> Tensor:
        """[T] -> [...]."""
        permuted = x.view([self.shape[d] for d in self.order])
        return permuted.permute([self.order.index(d) for d in range(len(self.order))])


_PADDING = 128  # Megatron pads the vocabulary to a multiple of this on every rank


def vocab_shard(
    local: int, vocab_size: int | None, tp_group: torch.distributed.ProcessGroup | None, what: str
) -> tuple[int, int]:
    """(first id of this rank, number of real tokens), from how many ids each rank holds.

    Raises:
        ValueError: more tokens than the ranks hold.
    """
    ranks, rank = (1, 0) if tp_group is None else (tp_group.size(), tp_group.rank())
    if vocab_size is None:
        vocab_size = local * ranks
    elif not 0 < vocab_size <= local * ranks:
        raise ValueError(
            f"vocab_size {vocab_size} does not fit: {ranks} rank(s) x {local} {what} hold {local * ranks} ids"
        )
    elif ranks > 1 and local >= vocab_size and local * ranks - vocab_size >= _PADDING * ranks:
        raise ValueError(
            f"each of the {ranks} ranks has all {vocab_size} tokens in its {local} {what}: with a tp_group they are "
            "this rank's part of the vocabulary; give that part, or no tp_group"
        )
    return rank * local, vocab_size


def checked_logits(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    tp_group: torch.distributed.ProcessGroup | None,
    vocab_size: int | None,
) -> tuple[RowLayout, int, int]:
    """How the logits' rows lie, this rank's first id and the number of real tokens.

    Raises:
        TypeError, ValueError: see vocab_parallel_logprob.
    """
    require_tensors(logits=logits)
    require_target(target, logits.device)
    if mask is not None:
        require_mask(mask, logits.device)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V > 0, got shape {tuple(logits.shape)}")
    shape = logits.shape[:-1]
    for name, x in (("target", target), ("mask", mask)):
        if x is not None and x.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but logits {tuple(logits.shape)} want {tuple(shape)}"
            )
    return RowLayout(logits), *vocab_shard(logits.shape[-1], vocab_size, tp_group, "columns")


def vocab_parallel_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """log softmax(logits)[target], with the vocabulary split over a tensor-parallel group.

    One pass over the logits, one all-gather of three float32 numbers a token, no copy of the logits in
    forward. Differentiable once, with respect to ``logits`` (docs/method.md, Words: ``lp_t``).

    Args:
        logits: [..., V_local] float32, bfloat16 or float16; rank r of n holds the columns
            [r * V_local, (r + 1) * V_local) of the vocabulary.
        target: [...] int64, global token ids; ids off the mask may be anything (-100).
        mask: [...] bool, True = wanted. Other rows are not read, give 0 and get gradient 0.
        tp_group: the ranks that share the vocabulary; None = the vocabulary is whole.
        vocab_size: number of real tokens; columns from there on are padding and stay out of the
            softmax. None = every column is a token.
        inplace_backward: let backward write the gradient over the logits (no second tensor of their
            size). For callers to whom the logits are of no use after the loss.

    Returns:
        [...] float32 log-probabilities.

    Raises:
        TypeError: what should be a tensor is something else.
        ValueError: shapes, dtypes or devices that do not fit.
        IndexError: a target outside the vocabulary where the mask is True (CPU; on CUDA a device-side
            assertion, since reading it back would stall the stream).
    """
    layout, start, vocab_size = checked_logits(logits, target, mask, tp_group, vocab_size)
    logprob = _VocabParallelLogprob.apply(
        layout.rows(logits),
        layout.flat(target),
        None if mask is None else layout.flat(mask),
        tp_group,
        start,
        vocab_size,
        inplace_backward,
    )
    return layout.unflat(logprob)
