"""PearLoss: PEAR's loss as torchtitan's Trainer calls its losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from torch.distributed import ProcessGroup
from torchtitan.components.loss import BaseLoss
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size

from pear_megatron.alignment_watch import AlignmentWatch
from pear_megatron.config import PearConfig
from pear_megatron.loss import loss_of_logprobs, report_keys, topk_of
from pear_megatron.ops.statistics import vocab_parallel_statistics


class PearLoss(BaseLoss):
    """The loss, on logits whose vocabulary is split over the tensor-parallel ranks or whole.

    Called with logits [B, S, V/tp], labels int64 [B, S] and the decisions of the step over all ranks, it gives this
    micro-batch's loss_sum divided by those decisions (loss_sum itself without them), and no metrics: they are
    ``means()``. What else it needs of the batch was left with ``remember``.

    Args:
        config: the loss, and the model's vocabulary.

    Raises:
        DataError: log-probs of the data that belong to other tokens (see AlignmentWatch).
        ValueError: a vocabulary that does not divide among the tensor-parallel ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """``pear``: how the loss is reweighted; ``vocab_size``: real tokens of the model."""

        pear: PearConfig
        vocab_size: Annotated[int, tyro.conf.Suppress]

        def to_dict(self) -> dict[str, Any]:
            """For torchtitan's logs."""
            return {"pear": self.pear.model_dump(mode="json"), "vocab_size": self.vocab_size}

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.pear, self._vocab_size = config.pear, config.vocab_size
        self._keys = report_keys(config.pear)
        self._check_alignment = AlignmentWatch(config.pear)
        self._batches: dict[int, dict[str, Tensor]] = {}
        self._sums: dict[bool, Tensor] = {}  # in training, in evaluation: [keys, 2] float64

    def remember(self, labels: Tensor, batch: dict[str, Tensor]) -> None:
        """Keeps what the loss will need when it is called with these labels.

        torchtitan gives a loss logits and labels, and hands on the very tensor, through pipeline schedules too.
        """
        self._batches[id(labels)] = {"labels": labels, **batch}

    def require_no_batch_left(self) -> None:
        """The loss of every batch was asked for.

        Raises:
            RuntimeError: it was not, or with other labels.
        """
        if self._batches:
            raise RuntimeError(
                f"{len(self._batches)} micro-batches got no loss of PEAR's: torchtitan, or this pipeline schedule, "
                "gives the loss copies of the labels; train without pipeline parallelism, or with 1F1B"
            )

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **unread: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and no metrics; see the class."""
        given = self._batches.pop(id(labels), None)
        if given is None:  # a pipeline schedule asks for shapes, with a copy of labels that are still to come
            return pred.sum(), {}
        mask = given["mask"]
        topk = (given["topk_ids"], given["topk_logprobs"]) if "topk_ids" in given else None
        with torch.autocast(pred.device.type, enabled=False):
            found = vocab_parallel_statistics(
                pred,
                labels,
                tp_group=_tensor_parallel_group(),
                vocab_size=self._vocab_size,
                topk=topk_of(self.pear, topk, mask=mask),
                tail=self.pear.kl_tail,
                entropy=self.pear.needs_entropy,
                mask=mask,
                inplace_backward=True,
            )
            compared = (found.logprob, given["behavior_logprobs"], mask, given["cu_seqlens"])
            reference = given.get("reference_logprobs")
            self._check_alignment(*compared, reference_logprobs=reference)
            loss_sum, _, report = loss_of_logprobs(
                *compared,
                self.pear,
                kl=found.kl,
                entropy=found.entropy,
                reward=given["reward"],
                token_weights=given.get("token_weights"),
                reference_logprobs=reference,
            )
        self._add(report)
        return (loss_sum if global_valid_tokens is None else loss_sum / global_valid_tokens), {}

    def _add(self, report: dict[str, Tensor]) -> None:
        training = torch.is_grad_enabled()
        sums = torch.stack([report[key].detach() for key in self._keys]).double()
        self._sums[training] = self._sums[training] + sums if training in self._sums else sums

    def means(self, *, training: bool, group: ProcessGroup | None) -> dict[str, float]:
        """``decisions``, and ratios of sums: over the micro-batches since the last call and the ranks of ``group``.

        Every rank calls it.
        """
        sums = self._sums.pop(training, None)
        if sums is None:  # a stage of a pipeline without the loss
            return {}
        if group is not None:
            torch.distributed.all_reduce(sums, group=group)
        pairs = dict(zip(self._keys, sums.tolist(), strict=True))
        del pairs["loss"]  # torchtitan's own
        means = {key: total / count if count else 0.0 for key, (total, count) in pairs.items()}
        return {"decisions": pairs["nll"][1], **means}


def _tensor_parallel_group() -> ProcessGroup | None:
    if spmd_mesh_size("tp") == 1:
        return None
    mesh = current_spmd_mesh()
    assert mesh is not None
    return mesh.get_group("tp")
