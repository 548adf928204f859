"""Trainer: a lean loop on Megatron-Core's schedules, DDP, optimizer and checkpoints."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pear_megatron.data import (
    BatchPlan,
    DataError,
    PackedBatch,
    TrajectoryDataset,
    micro_batches,
    num_micro_batches,
    prepare,
)
from pear_megatron.errors import PearError
from pear_megatron.loss import REPORT_KEYS
from pear_megatron.megatron import checkpoint
from pear_megatron.megatron.forward_step import PearForwardStep
from pear_megatron.megatron.initialize import initialize_weights
from pear_megatron.megatron.layout import Layout
from pear_megatron.megatron.model import build_model, transformer_engine_available, wrap_ddp
from pear_megatron.megatron.optimizer import build_optimizer, build_scheduler
from pear_megatron.recipe import Recipe, RecipeError
from pear_megatron.run_folder import RunFolder, check_same_run

log = logging.getLogger("pear_megatron")


class TrainingError(PearError, RuntimeError):
    """Training cannot go on: the message says at which step, why, and what to try."""


def _make_output_dir(output_dir: str) -> RecipeError | None:
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return RecipeError(f"output_dir {output_dir} cannot be made: {error}")
    return None


def open_dataset(recipe: Recipe, layout: Layout) -> TrajectoryDataset:
    """Prepares the data on rank 0 and opens it on every rank; an error there is an error everywhere.

    Raises:
        DataError: what is wrong with the data, file and line.
    """
    outcome: list[Any] = [None]
    if layout.is_main:
        data = recipe.data
        outcome[0] = _make_output_dir(recipe.output_dir)
        if data.cache_dir is None:
            data = data.model_copy(update={"cache_dir": str(Path(recipe.output_dir) / "data_cache")})
        try:
            outcome[0] = outcome[0] or prepare(
                data,
                require_behavior_logprobs=recipe.pear.variant != "none",
                vocab_size=recipe.model.vocab_size,
                progress=True,
            )
        except (DataError, ImportError, OSError) as error:
            outcome[0] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return TrajectoryDataset.open(outcome[0])


class Trainer:
    """One run on this rank.

    Args:
        recipe: what to train.
        layout: where this rank stands.

    Raises:
        RecipeError, DataError, CheckpointError: before the first step, on every rank.
    """

    def __init__(self, recipe: Recipe, layout: Layout) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.recipe, self.layout = recipe, layout
        self.root = Path(recipe.output_dir) / "checkpoints"
        resume_step = checkpoint.latest_step(self.root)
        if resume_step is not None:
            if not recipe.checkpoint.resume:
                raise RecipeError(
                    f"output_dir {recipe.output_dir} holds a run at step {resume_step} and checkpoint.resume is "
                    "false; choose another output_dir, or remove that folder to start anew"
                )
            check_same_run(Path(recipe.output_dir), recipe)

        self.dataset = open_dataset(recipe, layout)
        self.plan = BatchPlan(
            self.dataset.lengths,
            recipe.data.seq_length,
            recipe.train.global_batch_size,
            seed=recipe.seed,
            packing=recipe.data.packing,
        )
        self.total_steps = recipe.train.max_steps or self.plan.first_step(recipe.train.num_epochs)
        self.num_microbatches = num_micro_batches(
            recipe.train.global_batch_size, layout.dp_size, recipe.train.micro_batch_size
        )

        self.model = wrap_ddp(build_model(recipe.model, layout, recipe.train), recipe.parallel)
        initialize_weights(self.model, seed=recipe.seed, vocab_size=recipe.model.vocab_size)
        if recipe.checkpoint.pretrained and resume_step is None:
            checkpoint.load(checkpoint.resolve(recipe.checkpoint.pretrained), self.model)
        self.optimizer = build_optimizer(recipe, self.model)
        self.scheduler = build_scheduler(recipe, self.optimizer, self.total_steps)
        self.step = 0
        if resume_step is not None:
            path = checkpoint.checkpoint_path(self.root, resume_step)
            self.step = checkpoint.load(path, self.model, self.optimizer, self.scheduler)
        self.forward_step = PearForwardStep(
            recipe.pear,
            vocab_size=recipe.model.vocab_size,
            tp_group=layout.tp_group,
            packed_attention="thd" if transformer_engine_available() else "mask",
        )
        self.forward_backward = get_forward_backward_func()
        self.save_requested = False
        signal.signal(signal.SIGUSR1, self._request_save)

    def _request_save(self, *_: Any) -> None:
        self.save_requested = True

    def train(self) -> None:
        """Trains to the last step; saves on the way where asked, and at the end."""
        if self.layout.is_main:
            self._announce()
        if self.step >= self.total_steps:
            return
        run = None
        if self.layout.is_main:
            run = RunFolder(self.recipe, start_step=self.step, total_steps=self.total_steps)
        self.model.train()
        try:
            while self.step < self.total_steps:
                metrics, save_asked = self._train_step()
                if run is not None:
                    run.log_step(metrics)
                    self._warn_of_collapse(metrics)
                interval = self.recipe.checkpoint.save_interval
                due = interval is not None and self.step % interval == 0
                if due or save_asked or self.step == self.total_steps:
                    self._save()
        finally:
            if run is not None:
                run.close()
        if self.layout.is_main:
            log.info("done: %s", checkpoint.checkpoint_path(self.root, self.step))

    def _announce(self) -> None:
        recipe, layout = self.recipe, self.layout
        log.info(
            "%s: %d trajectories, %d decisions; TP %d x PP %d x DP %d on %s; steps %d to %d",
            f"PEAR {recipe.pear.variant}"
            if recipe.pear.variant != "none"
            else "plain SFT (pear.variant none)",
            len(self.dataset),
            self.dataset.num_decisions.sum(),
            layout.tp_size,
            layout.pp_size,
            layout.dp_size,
            layout.device.type.upper(),
            self.step,
            self.total_steps,
        )
        if self.step >= self.total_steps:
            log.info("nothing to do: %s is at step %d already", self.recipe.output_dir, self.step)

    def _micro_batches(self) -> Iterator[PackedBatch]:
        """This rank's part of the current step's global batch, on the CPU."""
        return micro_batches(
            self.dataset,
            self.plan,
            self.step,
            dp_rank=self.layout.dp_rank,
            dp_size=self.layout.dp_size,
            micro_batch_size=self.recipe.train.micro_batch_size,
        )

    def _train_step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer step -> its metrics, alike on every rank, and whether someone asked for a save."""
        started = time.perf_counter()
        recipe, layout = self.recipe, self.layout
        batches = self._micro_batches()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        flat = self.forward_step.packed_attention == "thd"
        rows, length = recipe.train.micro_batch_size, recipe.data.seq_length
        reports = self.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=(batch.to(layout.device, non_blocking=True) for batch in batches),
            model=[self.model],
            num_microbatches=self.num_microbatches,
            seq_length=rows * length if flat else length,
            micro_batch_size=1 if flat else rows,
            forward_only=False,
        )
        means, decisions, save_asked = self._reduce(reports)
        if not math.isfinite(means["loss"]):
            self._raise_not_finite(reports, means["loss"])
        lr = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        if recipe.optimizer.clip_grad == 0:
            grad_norm = self.optimizer.get_grad_norm()
        epoch, planned = self.plan.rows(self.step)
        self.scheduler.step(increment=1)
        self.step += 1
        tokens = sum(int(self.dataset.lengths[i]) - 1 for row in planned for i in row)
        seconds = time.perf_counter() - started
        metrics = {
            "step": self.step,
            "epoch": epoch,
            "loss": means.pop("loss"),
            "grad_norm": float(grad_norm),
            "lr": lr,
            "tokens_per_second": tokens / seconds,
            "tokens": tokens,
            "decisions": decisions,
            **means,
        }
        return metrics, save_asked

    def _reduce(self, reports: list[dict[str, torch.Tensor]]) -> tuple[dict[str, float], int, bool]:
        """Micro-batch reports -> means over the global batch on every rank, in one collective."""
        sums = torch.zeros((len(REPORT_KEYS) + 1, 2), dtype=torch.float64, device=self.layout.device)
        for report in reports if self.layout.reports else []:
            sums[:-1] += torch.stack([report[key] for key in REPORT_KEYS])
        sums[-1, 0] = float(self.save_requested)
        self.save_requested = False
        torch.distributed.all_reduce(sums)
        values = sums.tolist()
        means = {
            key: total / count if count else 0.0
            for key, (total, count) in zip(REPORT_KEYS, values, strict=False)
        }
        return means, int(values[0][1]), values[-1][0] > 0

    def _raise_not_finite(self, reports: list[dict[str, torch.Tensor]], loss: float) -> None:
        found = []
        if self.layout.reports:
            batches = self._micro_batches()
            for batch, report in zip(batches, reports, strict=True):
                if not torch.isfinite(report["loss"]).all():
                    found += [self.dataset[int(i)].id for i in batch.trajectory_index if i >= 0]
        everyone: list[Any] = [None] * self.layout.world_size
        torch.distributed.all_gather_object(everyone, (self.layout.rank, found))
        where = "; ".join(f"rank {rank}: {', '.join(ids[:8])}" for rank, ids in everyone if ids)
        raise TrainingError(
            f"loss is {loss} at step {self.step + 1}; the weights were not updated. Trajectories of the "
            f"micro-batches with a non-finite loss: {where or 'none found'}. Look at them, lower "
            "optimizer.lr or optimizer.clip_grad, or train with train.precision=fp32"
        )

    def _warn_of_collapse(self, metrics: dict[str, Any]) -> None:
        share = metrics["pear/weight_at_floor"]
        first = self.step == 1 or self.step % 50 == 0
        if share > 0.5 and first and self.recipe.pear.variant != "none":
            log.warning(
                "step %d: %.0f%% of the weights are at their floor (exp of pear.log_weight_clip[0]): most tokens "
                "train nothing. The model finds the data unlikely; try pear.baseline=sequence_mean, a higher "
                "lower bound in pear.log_ratio_clip, or pear.variant=block",
                self.step,
                100 * share,
            )

    def _save(self) -> None:
        checkpoint.save(self.root, self.step, self.layout, self.model, self.optimizer, self.scheduler)
