"""How logits lie: their rows in memory, and their columns over a tensor-parallel group."""

from __future__ import annotations

import torch
from torch import Tensor

from pear_megatron.ops.arguments import require_mask, require_target, require_tensors
from pear_megatron.ops.context_parallel import all_gather


def gather_ranks(stats: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """This rank's statistics [T, W] -> [ranks, T, W]: the one collective, 4 W bytes a token."""
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
