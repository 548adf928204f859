"""Trainer: a lean loop on Megatron-Core's schedules, DDP, optimizer and checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pear_megatron.data import BatchPlan, PackedBatch, micro_batches, num_micro_batches
from pear_megatron.loss import REPORT_KEYS
from pear_megatron.megatron import moe
from pear_megatron.megatron.checkpoint.paths import checkpoint_path
from pear_megatron.megatron.checkpoint.saver import CheckpointSaver
from pear_megatron.megatron.forward_step import PearForwardStep
from pear_megatron.megatron.layout import Layout, packed_attention
from pear_megatron.megatron.model import build_chunks, wrap_ddp
from pear_megatron.megatron.optimizer import build_optimizer, build_scheduler
from pear_megatron.megatron.output_chunks import require_output_processor
from pear_megatron.megatron.schedule import run_schedule
from pear_megatron.recipe import Recipe
from pear_megatron.storage import digest
from pear_megatron.train import resume
from pear_megatron.train.alignment_check import check_alignment
from pear_megatron.train.dataset import open_dataset
from pear_megatron.train.guards import WeightWatch, raise_bad_gradient, raise_not_finite, warn_of_collapse
from pear_megatron.train.position import DataPosition
from pear_megatron.train.run_folder import RunFolder
from pear_megatron.train.start import start_model
from pear_megatron.train.stop import StopRequest, leave_requeue_file
from pear_megatron.train.throughput import Throughput

log = logging.getLogger("pear_megatron")


class Trainer:
    """One run on this rank.

    Args:
        recipe: what to train.
        layout: where this rank stands.
        stop: tells this rank to stop early; one rank's is enough. None = nothing does.

    Raises:
        RecipeError, DataError, CheckpointError: before the first step, on every rank.
    """

    def __init__(self, recipe: Recipe, layout: Layout, stop: StopRequest | None = None) -> None:
        self.recipe, self.layout, self.stop = recipe, layout, stop or StopRequest()
        root = Path(recipe.output_dir) / "checkpoints"
        saved = resume.find(recipe, root)
        self.dataset = open_dataset(recipe)
        self.saver = CheckpointSaver(
            root, layout, keep_last=recipe.checkpoint.keep_last, asynchronous=recipe.checkpoint.async_save
        )
        self.position = DataPosition.of(recipe, self.dataset, layout)
        if saved:
            saved, data = resume.read(recipe, root, saved)
            self.position = self.position.resumed(data)
        self.plan = BatchPlan(
            self.dataset.lengths,
            recipe.data.seq_length,
            recipe.train.global_batch_size,
            seed=recipe.seed,
            packing=recipe.data.packing,
            multiple=self.position.multiple,
        )
        self.total_steps = recipe.train.max_steps or self.plan.first_step(recipe.train.num_epochs)
        self.routes = recipe.model.num_moe_experts is not None
        self.num_microbatches = num_micro_batches(
            recipe.train.global_batch_size, layout.dp_size, recipe.train.micro_batch_size
        )

        self.model: list[Any] = wrap_ddp(build_chunks(recipe.model, layout, recipe.train), recipe.parallel)
        if recipe.train.output_chunk_tokens is not None:
            require_output_processor(self.model[0])
        if not saved:
            start_model(recipe, layout, self.model)
        self.optimizer = build_optimizer(recipe, self.model)
        self.scheduler = build_scheduler(recipe, self.optimizer, self.total_steps)
        self.step = 0
        if saved:
            self.step = resume.load(root, saved, layout, self.model, self.optimizer, self.scheduler)
        self.forward_step = PearForwardStep(
            recipe.pear,
            vocab_size=recipe.model.vocab_size,
            tp_group=layout.tp_group,
            cp_group=layout.cp_group,
            packed_attention=packed_attention(recipe.train.precision),
            output_chunk_tokens=recipe.train.output_chunk_tokens,
        )
        self.throughput = Throughput(
            recipe.model, recipe.cluster, world_size=layout.world_size, device=layout.device
        )

    def train(self) -> bool:
        """Trains to the last step, or to the step at which a rank is asked to stop; saves there.

        Returns:
            False if the run was asked to stop, and waits in output_dir for going on.

        Raises:
            DataError, TrainingError, CheckpointError: on every rank.
        """
        if self.layout.is_main:
            self._announce()
        if self.step >= self.total_steps:
            return True
        if self.step == 0:
            check_alignment(
                self.recipe,
                self.layout,
                self.model,
                self.forward_step,
                self._micro_batches(),
                self.dataset,
            )
        self.stop.saves(self.saver.folder.root)
        run = None
        if self.layout.is_main:
            run = RunFolder(self.recipe, start_step=self.step, total_steps=self.total_steps)
        try:
            finished = self._train_steps(run)
            self.saver.finish()
        except BaseException:
            self.saver.abort()
            raise
        finally:
            if run is not None:
                run.close()
        if self.layout.is_main:
            self._say_goodbye(finished)
        return finished

    def _say_goodbye(self, finished: bool) -> None:
        folder = checkpoint_path(self.saver.folder.root, self.step)
        if finished:
            log.info("done: %s", folder)
            return
        message = f"stopped at step {self.step} of {self.total_steps}"
        leave_requeue_file(self.recipe.output_dir, message)
        if self.step:
            log.info("%s, and saved; the same command goes on: %s", message, folder)
        else:
            log.info("stopped before the first step, with nothing to save; the same command starts again")

    def _train_steps(self, run: RunFolder | None) -> bool:
        for chunk in self.model:
            chunk.train()
        interval = self.recipe.checkpoint.save_interval
        stop_asked = self._stop_asked()
        saved = self.step
        watch = WeightWatch(self.recipe.pear)
        while self.step < self.total_steps and not stop_asked:
            metrics, stop_asked = self._train_step()
            if run is not None:
                run.log_step(metrics)
                warn_of_collapse(metrics, self.recipe)
                watch(metrics)
            self.saver.poll()
            if interval is not None and self.step % interval == 0:
                self._save()
                saved = self.step
        if saved != self.step:
            self._save()
        return self.step >= self.total_steps

    def _stop_asked(self) -> bool:
        """Whether any rank was asked to stop before the first step."""
        asked = torch.tensor(float(self.stop.requested), device=self.layout.device)
        torch.distributed.all_reduce(asked)
        return bool(asked)

    def _announce(self) -> None:
        recipe, layout = self.recipe, self.layout
        what = f"PEAR {recipe.pear.variant}" if recipe.pear.variant != "none" else "plain SFT"
        sizes = {"TP": layout.tp_size, "PP": layout.pp_size, "VPP": layout.vpp_size, "CP": layout.cp_size}
        sizes["EP"] = layout.ep_size
        log.info(
            "%s: %d trajectories, %d decisions; %s on %s; steps %d to %d",
            what,
            len(self.dataset),
            self.dataset.num_decisions.sum(),
            " x ".join(f"{name} {n}" for name, n in {**sizes, "DP": layout.dp_size}.items() if n > 1)
            or "one process",
            layout.device.type.upper(),
            self.step,
            self.total_steps,
        )
        if self.step == 0 and not (recipe.model.hf or recipe.checkpoint.pretrained):
            log.info("weights are fresh: neither model.hf nor checkpoint.pretrained is given")
        if self.step >= self.total_steps:
            log.info("nothing to do: %s is at step %d already", recipe.output_dir, self.step)
        else:
            self._announce_checkpoints()

    def _announce_checkpoints(self) -> None:
        settings, folder = self.recipe.checkpoint, self.saver.folder
        if settings.keep_last is None:
            return
        if surplus := folder.surplus(self.step):
            log.warning(
                "checkpoint.keep_last is %d and %s holds %d checkpoints: the older ones (steps %s) are removed with "
                "the next save; stop now and set checkpoint.keep_last=null to keep all",
                settings.keep_last,
                folder.root,
                len(surplus) + settings.keep_last,
                ", ".join(map(str, reversed(surplus))),
            )
        elif settings.save_interval is not None:
            log.info(
                "a checkpoint every %d steps, of which the last %d stay (checkpoint.keep_last; null keeps all)",
                settings.save_interval,
                settings.keep_last,
            )

    def _micro_batches(self) -> Iterator[PackedBatch]:
        """This rank's part of the current step's global batch, on the CPU."""
        return micro_batches(
            self.dataset,
            self.plan,
            self.step,
            dp_rank=self.layout.dp_rank,
            dp_size=self.layout.dp_size,
            micro_batch_size=self.recipe.train.micro_batch_size,
            cp_rank=self.layout.cp_rank,
            cp_size=self.layout.cp_size,
        )

    def _train_step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer step -> its metrics, alike on every rank, and whether someone asked to stop."""
        started = time.perf_counter()
        recipe = self.recipe
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        epoch, planned = self.plan.rows(self.step)
        lengths = [int(self.dataset.lengths[i]) - 1 for row in planned for i in row]
        if self.routes:
            decisions = sum(int(self.dataset.num_decisions[i]) for row in planned for i in row)
            moe.start_step(self.model, divisor=max(decisions, 1), tokens=sum(lengths))
        reports = self._forward_backward()
        means, decisions, stop_asked = self._reduce(reports)
        if not math.isfinite(means["loss"]):
            self.saver.finish()
            raise_not_finite(
                means["loss"], self.step + 1, reports, self._micro_batches(), self.dataset, self.layout
            )
        lr = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        if recipe.optimizer.clip_grad == 0:
            grad_norm = self.optimizer.get_grad_norm()
        if not math.isfinite(grad_norm):
            self.saver.finish()
            raise_bad_gradient(grad_norm, self.step + 1, planned, self.dataset)
        self.scheduler.step(increment=1)
        self.step += 1
        seconds = time.perf_counter() - started
        metrics = {
            "step": self.step,
            "epoch": epoch,
            "loss": means.pop("loss"),
            "grad_norm": float(grad_norm),
            "lr": lr,
            **self.throughput(lengths, seconds),
            "tokens": sum(lengths),
            "decisions": decisions,
            "trajectories": digest([i for row in planned for i in row]),
            **means,
            **(self._router_losses(sum(lengths)) if self.routes else {}),
        }
        return metrics, stop_asked

    def _router_losses(self, tokens: int) -> dict[str, float]:
        """The routers' losses without their coefficients, means over layers and the step's tokens, on every rank."""
        sums = moe.step_sums(self.model, self.layout.device)
        torch.distributed.all_reduce(sums)
        count = tokens * self.recipe.model.num_layers
        kinds = (self.recipe.train.moe_aux_loss_coeff, self.recipe.train.moe_z_loss_coeff)
        means = zip(moe.METRICS, (sums / max(count, 1)).tolist(), kinds, strict=True)
        return {name: mean for name, mean, coefficient in means if coefficient}

    def _forward_backward(self) -> list[dict[str, torch.Tensor]]:
        """Megatron's schedule over the step's micro-batches -> their reports, on the last pipeline stage."""
        return run_schedule(
            self.forward_step,
            (batch.to(self.layout.device, non_blocking=True) for batch in self._micro_batches()),
            self.model,
            count=self.num_microbatches,
            shape=(self.recipe.train.micro_batch_size, self.recipe.data.seq_length),
            flat=self.forward_step.packed_attention == "thd",
        )

    def _reduce(self, reports: list[dict[str, torch.Tensor]]) -> tuple[dict[str, float], int, bool]:
        """Micro-batch reports -> means over the global batch on every rank, in one collective."""
        sums = torch.zeros((len(REPORT_KEYS) + 1, 2), dtype=torch.float64, device=self.layout.device)
        for report in reports if self.layout.reports else []:
            sums[:-1] += torch.stack([report[key] for key in REPORT_KEYS])
        sums[-1, 0] = float(self.stop.requested)
        torch.distributed.all_reduce(sums)
        values = sums.tolist()
        means = {
            key: total / count if count else 0.0
            for key, (total, count) in zip(REPORT_KEYS, values, strict=False)
        }
        return means, round(values[0][1]), values[-1][0] > 0

    def _save(self) -> None:
        if self.recipe.parallel.overlap_param_gather:
            for chunk in self.model:  # the last step's parameters arrive with the next forward pass
                chunk.start_param_sync(force_sync=True)
        common = {
            "data": asdict(self.position),
            "use_distributed_optimizer": self.recipe.parallel.use_distributed_optimizer,
        }
        self.saver.save(self.step, self.model, self.optimizer, self.scheduler, common)
