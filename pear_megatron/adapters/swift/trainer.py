"""PearMegatronTrainer: ms-swift's Megatron trainer with PEAR's forward step, data and report."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from swift.megatron.trainers import MegatronTrainer
from swift.utils import get_current_device, is_master

from pear_megatron.adapters.offline_data import OfflineBatches
from pear_megatron.adapters.swift.settings import check_model, pear_config
from pear_megatron.data import PackedBatch, TrajectoryDataset
from pear_megatron.loss import report_keys
from pear_megatron.megatron.forward_step import PearForwardStep
from pear_megatron.megatron.model import unwrap


@dataclass(frozen=True)
class PackedRows:
    """Trajectories as what ``megatron sft`` calls a data set: so many rows, in whole steps.

    Attributes:
        trajectories: the data.
        args: PearSftArguments, complete.
    """

    trajectories: TrajectoryDataset
    args: Any

    def batches(self, **options: Any) -> OfflineBatches:
        """This rank's micro-batches; ``options`` are OfflineBatches'."""
        args = self.args
        return OfflineBatches(
            self.trajectories,
            seq_length=args.seq_length,
            global_batch_size=args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=parallel_state.get_context_parallel_world_size(),
            seed=args.data_seed,
            device=torch.device(get_current_device()),
            **options,
        )

    def __len__(self) -> int:
        return self.batches().steps_per_epoch * self.args.global_batch_size


class _ForwardStep(PearForwardStep):
    """PearForwardStep for mcore-bridge's models, which take the experts' padding mask as a block's argument."""

    def _meet(self, model: Any) -> None:
        super()._meet(model)
        self._of_block = "extra_block_kwargs" in inspect.signature(unwrap(model).forward).parameters
        self._sequence_parallel = unwrap(model).config.sequence_parallel

    def _inputs(self, batch: PackedBatch) -> dict[str, Any]:
        inputs = super()._inputs(batch)
        if (mask := inputs.pop("padding_mask", None)) is not None:
            if self._sequence_parallel:  # the sequence is shared out among the tensor-parallel ranks
                assert self.tp_group is not None
                mask = mask.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()].contiguous()
            given = {"padding_mask": mask}
            inputs |= {"extra_block_kwargs": given} if self._of_block else given
        return inputs


class PearMegatronTrainer(MegatronTrainer):
    """ms-swift's MegatronTrainer under PEAR's loss; its data sets are PackedRows.

    Logs have ``loss``, ``nll`` and ``pear/...``, evaluations the same with ``eval_``: ratios of sums over all
    micro-batches and ranks.

    Args:
        args: PearSftArguments.
        template: ms-swift's; what its checkpoints keep of the tokenizer comes from it.

    Raises:
        RecipeError: settings under which the loss would be another one; here, or at the first micro-batch.
        DataError: while training: log-probs of the data that belong to other tokens (see AlignmentWatch).
    """

    def __init__(self, args: Any, template: Any) -> None:
        super().__init__(args, template)
        check_model(self.config)
        config = pear_config(args)
        self._keys = [key for key in report_keys(config) if key != "loss"]
        self._step = _ForwardStep(
            config,
            vocab_size=self.config.padded_vocab_size,  # the model's own; Megatron's padding comes on top
            packed_attention="thd",
            watch=True,
            check_alignment=True,
        )

    def forward_step(self, data_iterator: Any, model: Any) -> Any:
        """A micro-batch's output, and the function that makes (loss_sum, num_tokens, report) of it."""
        return self._step(data_iterator, model)

    def _prepare_data_iterator(
        self, train_dataset: Any, val_dataset: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        batches = train_dataset.batches(consumed_samples=self.state.consumed_train_samples)
        if is_master():
            batches.announce(self.args.train_iters)
        if val_dataset is None or not self.args.eval_iters:
            return batches, None
        return batches, val_dataset.batches(period=self.args.eval_iters)

    def _log_callback(self, logs: dict[str, Any], n_steps: int) -> None:
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            # Of this rank so far; ms-swift adds up ``loss`` itself. A key is missing where nothing was counted.
            nothing = torch.zeros(2, device=get_current_device())
            sums = torch.stack([logs.pop(key, nothing) for key in self._keys])
            torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(True))
            logs |= {key: pair for key, pair in zip(self._keys, sums, strict=True) if pair[1] > 0}
        super()._log_callback(logs, n_steps)
