"""PEAR in Hugging Face's Trainer: PearTrainer, and scored trajectories as the data set that it takes.

One trajectory a row, padded to the longest of its batch: what the Trainer's data loaders, samplers and accelerate's
DDP, FSDP and DeepSpeed know. docs/adapters/transformers.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from pear_megatron.adapters.offline_data import open_trajectories
from pear_megatron.alignment_watch import AlignmentWatch
from pear_megatron.config import PearConfig
from pear_megatron.data import DataConfig, PackedBatch, Trajectory, TrajectoryDataset, collate
from pear_megatron.data.columns import Columns, needs_behavior_logprobs
from pear_megatron.errors import CheckpointError, RecipeError
from pear_megatron.loss import loss_of_logprobs, report_keys, topk_of
from pear_megatron.ops.statistics import vocab_parallel_statistics
from pear_megatron.report import ReportWatch
from pear_megatron.storage import write_atomically

_BATCH = "trajectories"  # the input that is not the model's
_CONFIG = "pear.json"


class Trajectories(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Scored rows as a map-style data set: item i is ``{"input_ids": int32 [n], "trajectory": Trajectory}``.

    Every process builds it; rank 0 prepares the files where a process group runs (TrainingArguments starts it).

    Args:
        data: the files, and how rows become trajectories; ``seq_length`` is the longest row in positions, tokens - 1.
            ``packing`` has no say: a row is one trajectory.
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

    def __len__(self) -> int:
        return len(self.trajectories)

    def __getitem__(self, index: int) -> dict[str, Any]:
        trajectory = self.trajectories[index]
        return {"input_ids": trajectory.input_ids, "trajectory": trajectory}


@dataclass(frozen=True)
class PearCollator:
    """Items of ``Trajectories`` -> what PearTrainer takes: B rows of one trajectory each, padded at their ends.

    Labels are shifted already: position p is scored against ``labels[p]``.

    Attributes:
        pad_to_multiple_of: of the row's length S.
    """

    pad_to_multiple_of: int = 8

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels`` int64 [B, S], and the rest of a PackedBatch."""
        trajectories: list[Trajectory] = [item["trajectory"] for item in items]
        longest = max(len(t.input_ids) for t in trajectories) - 1
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = collate(trajectories, [[i] for i in range(len(items))], length)
        return {
            "input_ids": batch.tokens,
            "attention_mask": (~batch.padding_mask).long(),
            "labels": batch.labels,
            "shift_labels": batch.labels,  # the Trainer counts decisions in these as they are
            _BATCH: _tensors(batch),
        }


def _tensors(batch: PackedBatch) -> dict[str, Tensor]:
    """What the loss takes of a batch, as tensors that a data loader may pin and move."""
    found = {
        "behavior_logprobs": batch.behavior_logprobs,
        "mask": batch.loss_mask,
        "cu_seqlens": batch.cu_seqlens,
        "reward": batch.reward,
        "token_weights": batch.token_weights,
        "reference_logprobs": batch.reference_logprobs,
    }
    if batch.behavior_topk is not None:
        found["topk_ids"], found["topk_logprobs"] = batch.behavior_topk
    return {name: tensor for name, tensor in found.items() if tensor is not None}


class PearTrainer(Trainer):
    """transformers' Trainer under PEAR's loss.

    The gradient is that of the sum of losses over all micro-batches, accumulation steps and processes, divided by
    their decisions. Logs have ``nll`` and ``pear/...`` beside ``loss``, evaluations ``eval_nll`` and
    ``eval_pear/...``: ratios of global sums.

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
        self._keys = report_keys(pear)
        self._sums: dict[bool, Tensor] = {}  # in training, in evaluation: [keys, 2] float64
        self._check_alignment = AlignmentWatch(pear)
        self._watch = ReportWatch(pear) if self.is_world_process_zero() else None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """A micro-batch's loss: its sum over the decisions of the step, times the processes that are averaged."""
        inputs = {name: value for name, value in inputs.items() if name != "shift_labels"}
        labels, given = inputs.pop("labels"), inputs.pop(_BATCH)
        outputs = model(**inputs, use_cache=False)
        with torch.autocast(outputs.logits.device.type, enabled=False):
            loss_sum, decisions, report = self._loss(
                outputs.logits, labels, given, keep_logits=return_outputs
            )
        self._add(report)
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
        return (loss, outputs) if return_outputs else loss

    def _loss(
        self, logits: Tensor, labels: Tensor, given: dict[str, Tensor], *, keep_logits: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mask = given["mask"]
        topk = (given["topk_ids"], given["topk_logprobs"]) if "topk_ids" in given else None
        found = vocab_parallel_statistics(
            logits,
            labels,
            topk=topk_of(self.pear, topk, mask=mask),
            tail=self.pear.kl_tail,
            entropy=self.pear.needs_entropy,
            mask=mask,
            inplace_backward=not keep_logits,
        )
        compared = (found.logprob, given["behavior_logprobs"], mask, given["cu_seqlens"])
        reference = given.get("reference_logprobs")
        self._check_alignment(*compared, reference_logprobs=reference)
        return loss_of_logprobs(
            *compared,
            self.pear,
            kl=found.kl,
            entropy=found.entropy,
            reward=given["reward"],
            token_weights=given.get("token_weights"),
            reference_logprobs=reference,
        )

    def _add(self, report: dict[str, Tensor]) -> None:
        training = torch.is_grad_enabled()
        sums = torch.stack([report[key].detach() for key in self._keys]).double()
        self._sums[training] = self._sums[training] + sums if training in self._sums else sums
        if self._watch is not None:
            self._watch(report)

    def _means(self, *, training: bool) -> dict[str, float]:
        """Of all processes, since they were last asked for; every process asks."""
        if (sums := self._sums.pop(training, None)) is None:
            return {}
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums)
        return {
            key: total / count if count else 0.0
            for key, (total, count) in zip(self._keys, sums.tolist(), strict=True)
            if key != "loss"  # the Trainer's own
        }

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
        self._sums.pop(False, None)
        given = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output: Any = super().evaluation_loop(*given)
        means = self._means(training=False)
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in means.items()})
        return output

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = str(output_dir or self.args.output_dir)
            write_atomically(Path(folder) / _CONFIG, self.pear.model_dump_json(indent=1) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        if (file := Path(resume_from_checkpoint) / _CONFIG).is_file():
            before, now = json.loads(file.read_text()), json.loads(self.pear.model_dump_json())
            if changed := [key for key in now if key in before and before[key] != now[key]]:
                was, given = ({key: values[key] for key in changed} for values in (before, now))
                raise CheckpointError(
                    f"{resume_from_checkpoint} was trained with pear {was}, this run has {given}; give those again, or "
                    "begin another run from its weights"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)


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
