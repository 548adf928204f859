"""PearBatches: scored trajectories as a data loader of torchtitan's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

import tyro
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader

from pear_megatron.adapters.batch_loss import tensors_of
from pear_megatron.adapters.offline_data import OfflineBatches, open_trajectories
from pear_megatron.config import PearConfig
from pear_megatron.data import DataConfig, PackedBatch
from pear_megatron.data.columns import Columns, needs_behavior_logprobs

PREFIX = "pear_"  # of the tensors that are the loss's


class PearBatches(BaseDataLoader):
    """Micro-batches of offline trajectories, in the same order on every layout, epoch after epoch.

    Args:
        config: the files, and the loss that says what is read of them.
        dp_world_size, dp_rank: data-parallel ranks, and which of them this is.
        seq_len: positions in a row.
        local_batch_size: rows of a micro-batch.
        tokenizer, snapshot_every_n_steps: torchtitan's; not used.

    Raises:
        DataError: what is wrong with the data, by file and line; on every rank.
        RecipeError: a blend, or a batch that does not divide among the ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """``infinite``: epoch after epoch; False, for evaluations, is one. The rest is set by with_pear."""

        data: Annotated[DataConfig, tyro.conf.Suppress]
        pear: Annotated[PearConfig, tyro.conf.Suppress]
        vocab_size: Annotated[int, tyro.conf.Suppress]
        global_batch_size: Annotated[int, tyro.conf.Suppress] = -1
        seed: Annotated[int, tyro.conf.Suppress] = 0
        infinite: Annotated[bool, tyro.conf.Suppress] = True

        def to_dict(self) -> dict[str, Any]:
            """For torchtitan's logs."""
            return {"data": self.data.model_dump(mode="json"), "infinite": self.infinite}

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        tokenizer: Any = None,
        snapshot_every_n_steps: int | None = None,
    ) -> None:
        self._rows = open_trajectories(
            config.data.model_copy(update={"seq_length": seq_len}),
            needs_logprobs=needs_behavior_logprobs(config.pear),
            vocab_size=config.vocab_size,
            columns=Columns.of(config.pear),
        )
        rows_of_a_step = config.global_batch_size
        self._batches = OfflineBatches(
            self._rows,
            seq_length=seq_len,
            global_batch_size=rows_of_a_step if rows_of_a_step > 0 else local_batch_size * dp_world_size,
            micro_batch_size=local_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_world_size,
            seed=config.seed,
            packing=config.data.packing,
        )
        self._infinite = config.infinite

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        micro_batches = self._batches.steps_per_epoch * self._batches.micro_batches_per_step
        batches = self._batches if self._infinite else islice(self._batches, micro_batches)
        return map(_as_torchtitan_takes, batches)

    def state_dict(self) -> dict[str, Any]:
        """Rows that were seen by all ranks: the same on every layout."""
        return {"consumed_samples": self._batches.consumed_samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the run was."""
        self._batches.consumed_samples = state_dict["consumed_samples"]


def _as_torchtitan_takes(batch: PackedBatch) -> tuple[dict[str, Tensor], Tensor]:
    own = {"input": batch.tokens, "positions": batch.position_ids}
    return own | {PREFIX + name: tensor for name, tensor in tensors_of(batch).items()}, batch.labels
