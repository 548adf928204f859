"""PEAR in Hugging Face's Trainer: PearTrainer, and scored trajectories as the data set that it takes.

Items are rows: what the Trainer's data loaders, samplers and accelerate's DDP, FSDP and DeepSpeed know.
docs/adapters/transformers.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from pear_megatron.adapters.batch_loss import BatchLoss, require_same_loss, tensors_of
from pear_megatron.adapters.offline_data import open_trajectories
from pear_megatron.config import PearConfig
from pear_megatron.data import DataConfig, Trajectory, TrajectoryDataset, collate
from pear_megatron.data.columns import Columns, needs_behavior_logprobs
from pear_megatron.data.packing import plan_epoch
from pear_megatron.errors import RecipeError
from pear_megatron.report import ReportWatch

_BATCH = "trajectories"  # the input that is not the model's
_THE_TRAINERS_OWN = ("shift_labels", "skip_logits")


class Trajectories(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Scored trajectories as a map-style data set of rows: ``{"input_ids": int32 [n], "trajectories": [...]}``.

    Every process builds it; rank 0 prepares the files where a process group runs (TrainingArguments starts it).

    Args:
        data: the files, and how rows become trajectories; ``seq_length`` is the longest row in positions, a
            trajectory's tokens - 1. With ``packing`` a row holds as many trajectories as fit, the same in every
            epoch; without, it holds one.
        pear: the loss, which says what is read of the rows.
        vocab_size: real tokens of the model.

    Raises:
        DataError: what is wrong with the data, by file and line.
        RecipeError: a blend, or held-out data: give those to a data set of their own (``eval_dataset``).
    """

    def __init__(self, data: DataConfig, pear: PearConfig, *, vocab_size: int) -> None:
        self.trajectories: TrajectoryDataset = open_trajectories(
            data,
            needs_logprobs=needs_behavior_logprobs(pear),
            vocab_size=vocab_size,
            columns=Columns.of(pear),
        )
        self.packing = data.packing
        self.rows = plan_epoch(
            self.trajectories.lengths, data.seq_length, seed=0, epoch=0, packing=data.packing
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        trajectories = [self.trajectories[i] for i in self.rows[index]]
        return {
            "input_ids": np.concatenate([t.input_ids for t in trajectories]),  # for samplers by length
            "trajectories": trajectories,
            "packed": self.packing,
        }


@dataclass(frozen=True)
class PearCollator:
    """Items of ``Trajectories`` -> what PearTrainer takes: B rows, padded at their ends to the longest of them.

    Labels are shifted already: position p is scored against ``labels[p]``.

    Attributes:
        pad_to_multiple_of: of the row's length S.
    """

    pad_to_multiple_of: int = 8

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """``input_ids``, ``labels`` int64 [B, S], and the rest of a PackedBatch.

        Packed rows have ``position_ids`` int64 [B, S] that begin anew at every trajectory and no ``attention_mask``,
        which is how transformers keeps trajectories apart; others have an ``attention_mask`` int64 [B, S].
        """
        trajectories: list[Trajectory] = []
        rows, longest = [], 0
        for item in items:
            rows.append(range(len(trajectories), len(trajectories) + len(item["trajectories"])))
            trajectories += item["trajectories"]
            longest = max(longest, len(item["input_ids"]) - len(item["trajectories"]))
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = collate(trajectories, rows, length)
        return {
            "input_ids": batch.tokens,
            **(
                {"position_ids": batch.position_ids}
                if any(item["packed"] for item in items)
                else {"attention_mask": (~batch.padding_mask).long()}
            ),
            "labels": batch.labels,
            "shift_labels": batch.labels,  # the Trainer counts decisions in these as they are
            _BATCH: tensors_of(batch),
        }


class PearTrainer(Trainer):
    """transformers' Trainer under PEAR's loss.

    The gradient is that of the sum of losses over all micro-batches, accumulation steps and processes, divided by
    their decisions; the load balancing loss of a mixture of experts, where its config has ``output_router_logits``, is
    added as a mean over micro-batches and processes.

    Logs have ``nll`` and ``pear/...`` beside ``loss``, evaluations ``eval_nll`` and ``eval_pear/...``: ratios of global
    sums.

    Args:
        *args, **kwargs: the Trainer's. ``data_collator`` is a PearCollator if it is not given; ``train_dataset`` and
            ``eval_dataset`` hold what it collates (Trajectories).
        pear: how the loss is reweighted.

    Raises:
        RecipeError: settings under which the gradient would be another one.
        DataError: while training: log-probs of the data that belong to other tokens (see AlignmentWatch).
        CheckpointError: a checkpoint to resume from was trained under another loss.
    """

    def __init__(self, *args: Any, pear: PearConfig, **kwargs: Any) -> None:
        kwargs.setdefault("data_collator", PearCollator())
        super().__init__(*args, **kwargs)
        _check(self)
        self.args.remove_unused_columns = False  # a trajectory is no argument of the model's
        self.model_accepts_loss_kwargs = (
            True  # the Trainer counts a step's decisions, and leaves the loss as it is
        )
        self.pear = pear
        self.add_callback(LossOfTheRun(**pear.model_dump(mode="json")))
        self._batch_loss = BatchLoss(pear)
        self._model_config: Any = getattr(self.model, "config", None)
        self._rows_stay_apart = False  # until it was seen
        self._watch = ReportWatch(pear) if self.is_world_process_zero() else None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """A micro-batch's loss: its sum over the decisions of the step, times the processes that are averaged."""
        inputs = {name: value for name, value in inputs.items() if name not in _THE_TRAINERS_OWN}
        labels, given = inputs.pop("labels"), inputs.pop(_BATCH)
        if "position_ids" in inputs and not self._rows_stay_apart:
            _check_rows_stay_apart(model, vocab_size=self._model_config.get_text_config().vocab_size)
            self._rows_stay_apart = True
        outputs = model(**self._as_attention_takes(inputs), use_cache=False)
        logits = outputs.logits.view(*labels.shape, -1)
        loss_sum, decisions, report = self._batch_loss(
            logits, labels, given, inplace_backward=not return_outputs
        )
        if self._watch is not None:
            self._watch(report)
        if num_items_in_batch is None:
            if torch.is_grad_enabled():
                raise RecipeError(
                    "this Trainer does not say how many decisions a step has; update transformers"
                )
            num_items_in_batch = decisions
        elif self.args.average_tokens_across_devices:
            copies = self.accelerator.num_processes
            loss_sum = loss_sum * (copies // self.get_tp_size() if hasattr(self, "get_tp_size") else copies)
        loss = loss_sum / num_items_in_batch
        if (
            router := outputs.get("aux_loss")
        ) is not None:  # of a mixture of experts with output_router_logits
            loss = loss + router * (self._model_config.get_text_config().router_aux_loss_coef / self._steps())
        return (loss, outputs) if return_outputs else loss

    def _steps(self) -> int:
        """Micro-batches of this step, whose mean a loss is that does not count decisions."""
        return getattr(self, "current_gradient_accumulation_steps", 1) if torch.is_grad_enabled() else 1

    def _as_attention_takes(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Packed rows as one, [1, B * S], for flash attention: it looks for trajectories in a single row alone."""
        if "position_ids" in inputs and "flash" in (self._model_config._attn_implementation or ""):
            return {name: value.view(1, -1) for name, value in inputs.items()}
        return inputs

    def _means(self, *, training: bool) -> dict[str, float]:
        """Of all processes, since they were last asked for; every process asks."""
        group = torch.distributed.group.WORLD if self.args.world_size > 1 else None
        means = self._batch_loss.means(training=training, group=group)
        means.pop("decisions", None)
        return means

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the report's means since the last training log."""
        if "loss" in logs:
            logs = {**logs, **self._means(training=True)}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's, with the report's means over the whole evaluation among its metrics."""
        self._batch_loss.forget(training=False)
        given = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output: Any = super().evaluation_loop(*given)
        means = self._means(training=False)
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in means.items()})
        return output


class LossOfTheRun(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Puts the loss's settings into trainer_state.json, and refuses to go on from a checkpoint of another loss.

    Args:
        pear: the loss.
    """

    def __init__(self, **pear: Any) -> None:
        self._pear = pear

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps."""
        return {"args": self._pear, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compares: the state is the checkpoint's by now, under DDP, FSDP and DeepSpeed alike."""
        before = state.stateful_callbacks.get(type(self).__name__, self.state())["args"]
        require_same_loss(before, self._pear, otherwise="")


def _check_rows_stay_apart(model: Any, *, vocab_size: int) -> None:
    """Whether a trajectory of a packed row is read alone: what stands before it must not move its logits.

    Every process calls it (a sharded model's forward is a collective).

    Raises:
        RecipeError: it moves them.
    """
    training, n = model.training, 16
    device = next(model.parameters()).device
    first, other, second = torch.randint(
        vocab_size // 2, (3, n), generator=torch.Generator().manual_seed(0)
    ).to(device)
    position_ids = torch.arange(n, device=device).repeat(2)[None]
    model.eval()
    with torch.no_grad():
        alone, moved = (
            model(torch.cat([before, second])[None], position_ids=position_ids, use_cache=False).logits[0, n:]
            for before in (first, other)
        )
    model.train(training)
    if (moved - alone).abs().max() > 0.01 * alone.std():
        raise RecipeError(
            "this model lets packed trajectories see each other (its attention does not look at position_ids): pack "
            "none with DataConfig(packing=False), or load it with attn_implementation flash_attention_2, sdpa or eager "
            "in a transformers that packs with it"
        )


def _check(trainer: Trainer) -> None:
    """Refuses settings under which the gradient would be another one."""
    args = trainer.args
    if args.n_gpu > 1:
        raise RecipeError(
            f"one process with {args.n_gpu} GPUs (DataParallel) would cut batches into pieces that know nothing of "
            "their trajectories; start a process for each: torchrun --nproc-per-node or accelerate launch"
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise RecipeError(
            "average_tokens_across_devices=False: every process would count alike, however few decisions it has; set "
            "it to True"
        )
    if args.label_smoothing_factor:
        raise RecipeError("label_smoothing_factor is no part of PEAR's loss; set it to 0")
    if trainer.compute_loss_func is not None:
        raise RecipeError("compute_loss_func would take the place of PEAR's loss; leave it out")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        if (size := getattr(parallel, name, 1) or 1) > 1:
            raise RecipeError(
                f"{name} {size}: trajectories split over processes are known to python -m pear_megatron.train alone; "
                "set it to 1"
            )
