"""AlignmentWatch: log-probs of the data that belong to other tokens, refused in the first micro-batches of any loop."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor

from pear_megatron.alignment import MIN_PAIRS, Alignment, alignment_sums, read_alignment
from pear_megatron.config import PearConfig
from pear_megatron.data.errors import DataError
from pear_megatron.ranks import is_main

log = logging.getLogger("pear_megatron")

VARIABLE = "PEAR_CHECK_ALIGNMENT"
UNRELATED = 0.1  # a correlation below this says that the policies have nothing in common
_READ_AT = (1, 4, 16, 64)  # micro-batches; the host waits for the device there, and nowhere else


def compared_column(config: PearConfig) -> str | None:
    """The column that the ratios are taken against; without ratios, what else is read; None = nothing."""
    if config.variant == "none" and not config.needs_reference:
        return None
    by_reference = config.ratio == "reference" or config.variant == "none"
    return "reference_logprobs" if by_reference else "behavior_logprobs"


def warn_if_unrelated(alignment: Alignment, name: str, model: str) -> bool:
    """Whether the log-probs have nothing to do with the model's, which is then said."""
    r, count = alignment.correlations[0], alignment.decisions
    if r >= UNRELATED or count < MIN_PAIRS:
        return False
    log.warning(
        "%s have nothing to do with the log-probs of %s (correlation %.2f over %d "
        "decisions): were they computed over other tokens, with another tokenizer or chat template? "
        "(A writer that is certain of nearly every token, such as a program, looks like this too.) "
        "`pear-megatron inspect` shows more",
        name,
        model,
        r,
        count,
    )
    return True


class AlignmentWatch:
    """Looks at the first 64 micro-batches of a rank, inside loops whose start is not ours.

    Does nothing for losses that read no log-probs of the data, for evaluations (no gradients), and where the
    environment says ``PEAR_CHECK_ALIGNMENT=0``. Not for context-parallel shards, whose neighbours are none.

    Args:
        config: the run's.
    """

    def __init__(self, config: PearConfig) -> None:
        self._name = None if os.environ.get(VARIABLE) == "0" else compared_column(config)
        self._sums: Tensor | None = None
        self._seen = 0

    def __call__(
        self,
        logprob: Tensor,
        behavior_logprobs: Tensor | None,
        mask: Tensor,
        cu_seqlens: Tensor,
        *,
        reference_logprobs: Tensor | None = None,
    ) -> None:
        """Adds a micro-batch: [T] or [B, S] each, as ``loss_of_logprobs`` takes them.

        Raises:
            DataError: the log-probs in the data conclusively fit better when moved by a token or two.
        """
        given = reference_logprobs if self._name == "reference_logprobs" else behavior_logprobs
        if self._name is None or given is None or not torch.is_grad_enabled():
            return
        sums = alignment_sums(logprob.flatten(), given.flatten(), mask.flatten(), cu_seqlens)
        self._sums = sums if self._sums is None else self._sums + sums
        self._seen += 1
        if self._seen not in _READ_AT:
            return
        alignment, name = read_alignment(self._sums), self._name
        if self._seen == _READ_AT[-1]:
            self._name = self._sums = None
            if is_main():
                warn_if_unrelated(alignment, name, "the model")
        if alignment.shift:
            raise DataError([alignment.refusal(name, f"{VARIABLE}=0 in the environment")])
