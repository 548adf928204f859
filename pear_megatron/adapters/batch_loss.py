"""BatchLoss: PEAR's loss for trainers that have a micro-batch's logits, and add up what it reports by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pear_megatron.alignment_watch import AlignmentWatch
from pear_megatron.config import PearConfig
from pear_megatron.data import PackedBatch
from pear_megatron.errors import CheckpointError
from pear_megatron.loss import loss_of_logprobs, report_keys, topk_of
from pear_megatron.ops.statistics import vocab_parallel_statistics


def tensors_of(batch: PackedBatch) -> dict[str, Tensor]:
    """What the loss takes of a batch beside its labels, as tensors that a data loader may pin and move."""
    ids, logprobs = batch.behavior_topk or (None, None)
    found = {
        "behavior_logprobs": batch.behavior_logprobs,
        "mask": batch.loss_mask,
        "cu_seqlens": batch.cu_seqlens,
        "reward": batch.reward,
        "token_weights": batch.token_weights,
        "reference_logprobs": batch.reference_logprobs,
        "topk_ids": ids,
        "topk_logprobs": logprobs,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def require_same_loss(before: Mapping[str, Any], now: Mapping[str, Any], *, otherwise: str) -> None:
    """The settings of a checkpoint's loss must be this run's; what one of them does not know may differ.

    Raises:
        CheckpointError: names those that are not, with the way out.
    """
    if changed := [key for key in now if key in before and before[key] != now[key]]:
        was, given = ({key: values[key] for key in changed} for values in (before, now))
        raise CheckpointError(
            f"the checkpoint was trained with pear {was}, this run has {given}; give those again, or begin "
            f"another run from its weights{otherwise}"
        )


class BatchLoss:
    """The loss of micro-batches, and the sums of their reports, of training and of evaluations (no gradients) apart.

    Args:
        pear: how the loss is reweighted.

    Raises:
        DataError: when it is called: log-probs of the data that belong to other tokens (see AlignmentWatch).
    """

    def __init__(self, pear: PearConfig) -> None:
        self.pear = pear
        self._keys = report_keys(pear)
        self._sums: dict[bool, Tensor] = {}  # in training, in evaluation: [keys, 2] float64
        self._check_alignment = AlignmentWatch(pear)

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        given: Mapping[str, Tensor],
        *,
        tp_group: ProcessGroup | None = None,
        vocab_size: int | None = None,
        inplace_backward: bool = True,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """pear_loss of logits [B, S, V/tp] and labels [B, S], with what ``tensors_of`` gave."""
        mask = given["mask"]
        topk = (given["topk_ids"], given["topk_logprobs"]) if "topk_ids" in given else None
        with torch.autocast(logits.device.type, enabled=False):
            found = vocab_parallel_statistics(
                logits,
                labels,
                topk=topk_of(self.pear, topk, mask=mask),
                tail=self.pear.kl_tail,
                entropy=self.pear.needs_entropy,
                mask=mask,
                tp_group=tp_group,
                vocab_size=vocab_size,
                inplace_backward=inplace_backward,
            )
            compared = (found.logprob, given["behavior_logprobs"], mask, given["cu_seqlens"])
            reference = given.get("reference_logprobs")
            self._check_alignment(*compared, reference_logprobs=reference)
            loss_sum, decisions, report = loss_of_logprobs(
                *compared,
                self.pear,
                kl=found.kl,
                entropy=found.entropy,
                reward=given["reward"],
                token_weights=given.get("token_weights"),
                reference_logprobs=reference,
            )
        training = torch.is_grad_enabled()
        sums = torch.stack([report[key].detach() for key in self._keys]).double()
        self._sums[training] = self._sums[training] + sums if training in self._sums else sums
        return loss_sum, decisions, report

    def forget(self, *, training: bool) -> None:
        """Begins the sums anew."""
        self._sums.pop(training, None)

    def means(self, *, training: bool, group: ProcessGroup | None = None) -> dict[str, float]:
        """``decisions``, and ratios of sums: over the micro-batches since the last call and the ranks of ``group``.

        Every rank of it calls; None = this one alone. ``{}`` where there was no micro-batch.
        """
        if (sums := self._sums.pop(training, None)) is None:
            return {}
        if group is not None:
            torch.distributed.all_reduce(sums, group=group)
        pairs = dict(zip(self._keys, sums.tolist(), strict=True))
        del pairs["loss"]  # the trainer's own
        means = {key: total / count if count else 0.0 for key, (total, count) in pairs.items()}
        return {"decisions": pairs["nll"][1], **means}
