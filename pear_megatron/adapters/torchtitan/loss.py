"""PearLoss: PEAR's loss as torchtitan's Trainer calls its losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from torch import Tensor
from torch.distributed import ProcessGroup
from torchtitan.components.loss import BaseLoss
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size

from pear_megatron.adapters.batch_loss import BatchLoss
from pear_megatron.config import PearConfig


class PearLoss(BaseLoss):
    """The loss, on logits whose vocabulary is split over the tensor-parallel ranks or whole.

    Called with logits [B, S, V/tp], labels int64 [B, S] and the decisions of the step over all ranks, it gives this
    micro-batch's loss_sum divided by those decisions (loss_sum itself without them), and no metrics: they are
    ``batch_loss.means()``. What else it needs of the batch was left with ``remember``.

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
        self.batch_loss, self._vocab_size = BatchLoss(config.pear), config.vocab_size
        self._batches: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def remember(self, labels: Tensor, batch: dict[str, Tensor]) -> None:
        """Keeps what the loss will need when it is called with these labels.

        torchtitan gives a loss logits and labels, and hands on the very tensor, through pipeline schedules too.
        """
        self._batches[id(labels)] = labels, batch

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
        found = self._batches.pop(id(labels), None)
        if found is None:  # a pipeline schedule asks for shapes, with a copy of labels that are still to come
            return pred.sum(), {}
        loss_sum, _, _ = self.batch_loss(
            pred, *found, tp_group=_tensor_parallel_group(), vocab_size=self._vocab_size
        )
        return (loss_sum if global_valid_tokens is None else loss_sum / global_valid_tokens), {}


def _tensor_parallel_group() -> ProcessGroup | None:
    if spmd_mesh_size("tp") == 1:
        return None
    mesh = current_spmd_mesh()
    assert mesh is not None
    return mesh.get_group("tp")
