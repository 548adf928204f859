"""Where a context-parallel rank's logits stand in the samples of one of slime's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pear_megatron.ops.context_parallel import shard_positions


@dataclass(frozen=True)
class Layout:
    """The positions that this rank holds, in its order, without the padding that slime puts at the end.

    slime cuts every sample of n tokens, padded at its end to a multiple of 2 * CP, into 2 * CP chunks; rank r holds
    chunks r and 2 * CP - 1 - r of each, sample after sample (slime/backends/megatron_utils/cp_utils.py,
    ``slice_with_cp``): the zigzag layout of ``importance_weights``. Without context parallelism nothing is padded.

    Attributes:
        cu_seqlens: int32 [samples + 1], the padded samples' boundaries in the whole pack, over all ranks.
        following: int64 [T], for each position, where the token that it predicts stands in the joined tokens of the
            samples; at a sample's end and in its padding, that of its last token.
        scoring: int64 [R], the positions that predict response tokens, in the order in which slime slices what it
            has per response token (``slice_log_prob_with_cp``).
    """

    cu_seqlens: Tensor
    following: Tensor
    scoring: Tensor

    @property
    def length(self) -> int:
        """T, the rank's positions."""
        return self.following.numel()

    @classmethod
    def of(
        cls, total_lengths: Sequence[int], response_lengths: Sequence[int], *, cp_rank: int, cp_size: int
    ) -> Layout:
        """The layout of samples of so many tokens, of which so many at the end are the response; on the CPU."""
        total, response = torch.tensor(total_lengths), torch.tensor(response_lengths)
        multiple = 2 * cp_size if cp_size > 1 else 1
        padded = -(-total // multiple) * multiple
        starts, cu = total.cumsum(0) - total, torch.zeros(len(total) + 1, dtype=torch.int32)
        cu[1:] = padded.cumsum(0)
        local = int(cu[-1]) // cp_size
        positions = torch.arange(local)
        if cp_size > 1:
            positions = shard_positions(cu, cp_size, "zigzag", local)[cp_rank]
        sample = torch.arange(len(total)).repeat_interleave(padded // cp_size)
        within = positions - cu[sample]
        last = total[sample] - 1
        scores = (within >= last - response[sample]) & (within < last)
        return cls(cu, starts[sample] + torch.minimum(within + 1, last), scores.nonzero().flatten())
