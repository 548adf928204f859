"""Log-probs, entropies and divergences from a stored top-k, all from one pass over vocabulary-sharded logits."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pear_megatron.ops.arguments import require_tensors
from pear_megatron.ops.library import TOKEN_STATISTICS, ops
from pear_megatron.ops.rows import checked_logits, gather_ranks

Tail = Literal["none", "bucket"]
# The behaviour policy's likeliest tokens: ids [T, k] int32 (-1 = no entry) and their log-probs [T, k] float32.
TopK = tuple[Tensor, Tensor]


class TokenStatistics(NamedTuple):
    """What the logits say of each token, [...] float32 and 0 off the mask; None = not asked for.

    Attributes:
        logprob: of the target, differentiable.
        kl: divergence from the behaviour policy's top-k, differentiable.
        entropy: of the softmax, in nats, without a gradient.
    """

    logprob: Tensor
    kl: Tensor | None = None
    entropy: Tensor | None = None


class TokenPass(NamedTuple):
    """What is wanted of each row of logits, and the kernels that find it; rows may come in slices.

    Attributes:
        target: [T] int64.
        mask: [T] bool.
        topk: ([T, k] int32, [T, k] float32); None = no KL.
        bucket: the rest of the mass is one more token.
        entropy: whether it is wanted.
        vocab: this rank's first id, and the number of real tokens.
    """

    target: Tensor
    mask: Tensor | None
    topk: TopK | None
    bucket: bool
    entropy: bool
    vocab: tuple[int, int]

    @property
    def width(self) -> int:
        """Float32 numbers that forward gives for a token."""
        return TOKEN_STATISTICS + self.entropy + (0 if self.topk is None else self.topk[0].shape[1])

    def tensors(self) -> list[Tensor | None]:
        """To be saved for backward, so that a change in between is an error."""
        return [self.target, self.mask, *(self.topk or ())]

    def forward(self, logits: Tensor, rows: slice | None = None) -> Tensor:
        """Logits of these rows -> their statistics [rows, width], of this rank."""
        ids = None if self.topk is None else self.topk[0]
        target, mask, ids = (_rows(x, rows) for x in (self.target, self.mask, ids))
        return ops.statistics_forward(logits, target, mask, *self.vocab, ids, self.entropy)

    def combine(self, stats: Tensor) -> tuple[TokenStatistics, list[Tensor]]:
        """[ranks, T, width] -> what they say, and what ``backward`` wants to have kept."""
        ids, logprobs = (None, None) if self.topk is None else self.topk
        logprob, normalizer, entropy, kl, log_pi, terms = ops.statistics_combine(
            stats, self.mask, self.vocab[1], ids, logprobs, self.entropy, self.bucket
        )
        if self.topk is None:
            return TokenStatistics(logprob, None, entropy if self.entropy else None), [normalizer]
        return TokenStatistics(logprob, kl, entropy if self.entropy else None), [normalizer, log_pi, terms]

    def backward(
        self,
        logits: Tensor,
        kept: list[Tensor],
        grad: Tensor,
        kl_grad: Tensor | None,
        rows: slice | None = None,
        *,
        inplace: bool,
    ) -> Tensor:
        """The gradient of these rows' logits, written over them if ``inplace``; grad, kl_grad [T] float32."""
        of_rows = [self.target, self.mask, kept[0], grad]
        of_topk = [] if self.topk is None else [*self.topk, *kept[1:], kl_grad]
        args = [*(_rows(x, rows) for x in of_rows), *self.vocab, *(_rows(x, rows) for x in of_topk)]
        if not inplace:
            return ops.statistics_backward(logits, *args)
        ops.statistics_backward_(logits, *args)
        return logits


def _rows(x: Tensor | None, rows: slice | None) -> Tensor | None:
    return x if x is None or rows is None else x[rows]


def differentiable(ctx: Any, found: TokenStatistics) -> tuple[Tensor | None, ...]:
    """A forward pass's outputs, of which the entropy has no gradient."""
    if found.entropy is not None:
        ctx.mark_non_differentiable(found.entropy)
    return tuple(found)


class _VocabParallelStatistics(torch.autograd.Function):
    """logits [T, V_local] -> TokenStatistics; saves the logits, what it was given, and k numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        wanted: TokenPass,
        tp_group: torch.distributed.ProcessGroup | None,
        inplace_backward: bool,
    ) -> tuple[Tensor | None, ...]:
        found, kept = wanted.combine(gather_ranks(wanted.forward(logits), tp_group))
        ctx.save_for_backward(logits, *kept, *wanted.tensors())
        ctx.wanted, ctx.kept, ctx.inplace = wanted, len(kept), inplace_backward
        return differentiable(ctx, found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, kl_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        grad = grad.float().contiguous()
        kl_grad = None if kl_grad is None else kl_grad.float().contiguous()
        grad_logits = ctx.wanted.backward(logits, saved[: ctx.kept], grad, kl_grad, inplace=ctx.inplace)
        if ctx.inplace:  # whoever still wants these logits gets an error, not gradients
            torch.autograd.graph.increment_version(logits)
        return grad_logits, None, None, None


def checked_topk(topk: Any, shape: torch.Size, device: torch.device) -> TopK:
    """A top-k's ids and log-probs, [*shape, k] or flat [tokens, k] each, as contiguous [tokens, k].

    Raises:
        TypeError, ValueError: no pair of tensors; shapes, dtypes or devices that do not fit.
    """
    if not (isinstance(topk, tuple | list) and len(topk) == 2):
        raise TypeError(
            f"the top-k must be a pair of tensors, (ids, log-probs), got {type(topk).__name__}; give both"
        )
    ids, logprobs = topk
    require_tensors(device, topk_ids=ids, topk_logprobs=logprobs)
    tokens = shape.numel()
    for name, x, dtype, cast in (
        ("topk_ids", ids, torch.int32, "int"),
        ("topk_logprobs", logprobs, torch.float32, "float"),
    ):
        fits = x.dim() > 0 and x.shape[-1] > 0 and x.shape[:-1].numel() == tokens and x.shape == ids.shape
        if not fits or (x.dim() > 2 and len(shape) > 1 and x.shape[:-1] != shape):
            beside = "" if x is ids else f" and topk_ids {tuple(ids.shape)}"
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}{beside}; give both as [..., k], k > 0, for the {tokens} tokens of "
                f"target, which has shape {tuple(shape)}"
            )
        if x.dtype != dtype:
            raise ValueError(f"{name} is {x.dtype}, not {dtype}; give {name}.{cast}()")
    if logprobs.requires_grad:
        raise ValueError(
            "topk_logprobs require a gradient, but the behaviour policy is fixed; give topk_logprobs.detach()"
        )
    k = ids.shape[-1]
    return ids.reshape(tokens, k).contiguous(), logprobs.reshape(tokens, k).contiguous()


def vocab_parallel_statistics(
    logits: Tensor,
    target: Tensor,
    *,
    topk: TopK | None = None,
    tail: Tail = "none",
    entropy: bool = False,
    mask: Tensor | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> TokenStatistics:
    """vocab_parallel_logprob, and in the same pass the KL and the entropy where they are asked for.

    Still one read of the logits, one collective (12 bytes a token, 4 more with the entropy and 4 k with a top-k)
    and in backward one read and one write.

    Args:
        logits, target, mask, tp_group, vocab_size, inplace_backward: as in vocab_parallel_logprob.
        topk: ids [..., k] int32 (-1 = no entry) and log-probs [..., k] float32 of the behaviour policy's likeliest
            tokens (docs/method.md, Base loss), token by token; anything off the mask. None = no KL.
        tail: what becomes of the mass outside, as PearConfig's ``kl_tail``.
        entropy: whether it is wanted.

    Returns:
        What was asked for, each [...] float32.

    Raises:
        TypeError, ValueError, IndexError: see vocab_parallel_logprob and vocab_parallel_topk_kl.
    """
    layout, start, vocab_size = checked_logits(logits, target, mask, tp_group, vocab_size)
    if topk is not None:
        ids, logprobs = (
            x.view(*target.shape, x.shape[1]) for x in checked_topk(topk, target.shape, logits.device)
        )
        topk = layout.flat(ids), layout.flat(logprobs)
    wanted = TokenPass(
        layout.flat(target),
        None if mask is None else layout.flat(mask),
        topk,
        checked_tail(tail) == "bucket",
        entropy,
        (start, vocab_size),
    )
    found = _VocabParallelStatistics.apply(layout.rows(logits), wanted, tp_group, inplace_backward)
    return TokenStatistics._make(None if x is None else layout.unflat(x) for x in found)


def checked_tail(tail: Any) -> Tail:
    """Raises ValueError on what is no tail."""
    if tail not in ("none", "bucket"):
        raise ValueError(f"tail must be 'none' or 'bucket', got {tail!r}")
    return tail


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
    return vocab_parallel_statistics(
        logits,
        target,
        mask=mask,
        tp_group=tp_group,
        vocab_size=vocab_size,
        inplace_backward=inplace_backward,
    ).logprob


def vocab_parallel_topk_kl(
    logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    tail: Tail = "none",
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """KL(q || softmax(logits)) of each token over the behaviour policy's stored top-k, the vocabulary split over a
    tensor-parallel group (docs/method.md, Base loss).

    One pass over the logits, one all-gather of 12 + 4 k bytes a token, no copy of the logits in forward, 4 k bytes a
    token kept for backward. Differentiable once, with respect to ``logits``. pear_loss takes it in one pass
    with the log-probs.

    Args:
        logits: [..., V_local] float32, bfloat16 or float16; rank r of n holds the columns
            [r * V_local, (r + 1) * V_local) of the vocabulary.
        topk_ids: [..., k] int32, global token ids, each once; -1 = no entry. Anything off the mask.
        topk_logprobs: [..., k] float32, natural logarithms of the behaviour policy's probabilities.
        mask: [...] bool, True = wanted. Other rows are not read, give 0 and get gradient 0.
        tail: ``none`` renormalises the behaviour policy over the top-k, ``bucket`` compares the rest as one more token.
        tp_group: the ranks that share the vocabulary; None = the vocabulary is whole.
        vocab_size: number of real tokens; columns from there on are padding. None = every column is a token.
        inplace_backward: let backward write the gradient over the logits.

    Returns:
        [...] float32 divergences, in nats.

    Raises:
        TypeError: what should be a tensor is something else.
        ValueError: shapes, dtypes or devices that do not fit; where the mask is True, an id that is there twice, a
            log-prob that is NaN or positive, or no entry at all.
        IndexError: an id outside the vocabulary where the mask is True. What needs a look at the values is a
            device-side assertion on CUDA.
    """
    require_tensors(logits=logits)
    target = torch.zeros(
        logits.shape[:-1], dtype=torch.int64, device=logits.device
    )  # any: its log-prob is not used
    found = vocab_parallel_statistics(
        logits,
        target,
        topk=(topk_ids, topk_logprobs),
        tail=tail,
        mask=mask,
        tp_group=tp_group,
        vocab_size=vocab_size,
        inplace_backward=inplace_backward,
    )
    assert found.kl is not None
    return found.kl
