"""check_alignment: refuses log-probs of the data that belong to other tokens, before the first step of a run."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from pear_megatron.alignment import (
    MIN_PAIRS,
    REFERENCE_APART,
    Alignment,
    alignment_sums,
    no_sums,
    read_alignment,
)
from pear_megatron.alignment_watch import compared_column, warn_if_unrelated
from pear_megatron.data import DataError, PackedBatch
from pear_megatron.megatron.forward_step import LossOutput, PearForwardStep
from pear_megatron.megatron.layout import Layout
from pear_megatron.ops.statistics import TokenStatistics, vocab_parallel_logprob
from pear_megatron.recipe import Recipe
from pear_megatron.train.passes import Passes, evaluating

log = logging.getLogger("pear_megatron")


class AlignmentStep(PearForwardStep):
    """A forward step whose report is the micro-batch's ``alignment_sums``."""

    def loss(self, logits: Tensor, batch: PackedBatch) -> LossOutput:
        """[B, S, V/tp] logits (or one flat row) -> Megatron's loss tuple; nothing is learnt from it."""
        logprobs = vocab_parallel_logprob(
            logits,
            batch.labels.view(logits.shape[:-1]),
            mask=batch.loss_mask.view(logits.shape[:-1]),
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
        )
        return self.loss_of_statistics(TokenStatistics(logprobs.flatten()), batch)

    def loss_of_statistics(self, found: TokenStatistics, batch: PackedBatch) -> LossOutput:
        """The same from [T] log-probs."""
        logprobs = found.logprob
        mask = batch.loss_mask.flatten()
        given = getattr(batch, str(compared_column(self.config))).flatten()
        sums = alignment_sums(logprobs, given, mask, batch.cu_seqlens)
        apart = torch.zeros(2, dtype=torch.float64, device=logprobs.device)  # sum of differences, decisions
        if self.config.needs_reference and batch.reference_logprobs is not None:
            reference = batch.reference_logprobs.flatten()
            apart = torch.stack([((logprobs - reference).abs() * mask).sum().double(), mask.sum().double()])
        return logprobs.sum(), mask.sum(dtype=torch.int32), {"alignment": sums, "apart": apart}


def check_alignment(recipe: Recipe, layout: Layout, chunks: list[Any], passes: Passes) -> None:
    """Compares the model's log-probs of the first step with those in the data, by forward passes with an AlignmentStep.

    Changes nothing: no gradients, no random numbers. A reference that is another model than this is warned of. Does
    nothing where the loss reads no log-probs of the data, as plain SFT, where
    train.check_alignment is false, for fresh weights, which know nothing of the data, and under context
    parallelism, where a rank's neighbouring tokens are not neighbours. Every rank calls it.

    Raises:
        DataError: on every rank, if the log-probs in the data conclusively fit better when moved by a token
            or two (see ``read_alignment``).
    """
    starts_from = recipe.model.hf or recipe.checkpoint.pretrained
    name = compared_column(recipe.pear)
    if starts_from is None or name is None or not recipe.train.check_alignment or layout.cp_size > 1:
        return
    sums, apart = no_sums(layout.device), torch.zeros(2, dtype=torch.float64, device=layout.device)
    with evaluating(chunks):
        reports = passes.run(chunks, 0, forward_only=True)
    for report in reports if layout.reports else ():
        sums += report["alignment"]
        apart += report["apart"]
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(apart)
    alignment = read_alignment(sums)
    if alignment.shift:
        first = [i for row in passes.plan.rows(0)[1] for i in row][:3]
        ids = ", ".join(passes.dataset[i].id for i in first)
        raise DataError(f"{passes.dataset.meta['files'][0]} ({ids}, ...): {alignment.refusal(name)}")
    if layout.is_main:
        _say(alignment, starts_from, name)
        if float(apart[0]) > REFERENCE_APART * float(apart[1]):
            log.warning(
                "reference_logprobs differ from the log-probs of %s by %.2f on average; the reference is the model "
                "before training: score the data again with it, `pear-megatron score --as reference`",
                starts_from,
                apart[0] / apart[1],
            )


def _say(alignment: Alignment, starts_from: str, name: str) -> None:
    if not warn_if_unrelated(alignment, name, starts_from):
        r, count = alignment.correlations[0], alignment.decisions
        shift = "no shift found" if count >= MIN_PAIRS else "too few to tell a shift"
        log.info("%s and the model's correlate by %.2f over %d decisions; %s", name, r, count, shift)
