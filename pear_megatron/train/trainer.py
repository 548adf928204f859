"""Trainer: a lean loop on Megatron-Core's schedules, DDP, optimizer and checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pear_megatron.data import AnyDataset, TrajectoryBlend, plan_batches
from pear_megatron.data.blend import source_names
from pear_megatron.megatron import moe
from pear_megatron.megatron.attention import packed_attention
from pear_megatron.megatron.checkpoint.paths import checkpoint_path
from pear_megatron.megatron.checkpoint.restricted import read_common
from pear_megatron.megatron.checkpoint.saver import CheckpointSaver
from pear_megatron.megatron.forward_step import PearForwardStep
from pear_megatron.megatron.layout import Layout
from pear_megatron.megatron.lora import add_adapters
from pear_megatron.megatron.model import build_chunks, gpt_class, sync_parameters, wrap_ddp
from pear_megatron.megatron.optimizer import build_optimizer, build_scheduler, optimizer_config
from pear_megatron.megatron.output_chunks import require_output_processor
from pear_megatron.megatron.userbuffers import start_userbuffers
from pear_megatron.ranks import from_main
from pear_megatron.recipe import Recipe
from pear_megatron.report import watch_weights
from pear_megatron.storage import digest
from pear_megatron.train import resume
from pear_megatron.train.alignment_check import AlignmentStep, check_alignment
from pear_megatron.train.announce import announce, say_goodbye
from pear_megatron.train.best import Best
from pear_megatron.train.dataset import open_dataset, open_validation
from pear_megatron.train.evaluation import Evaluation
from pear_megatron.train.exports import Exports
from pear_megatron.train.guards import raise_bad_gradient, raise_not_finite
from pear_megatron.train.passes import Passes
from pear_megatron.train.position import DataPosition
from pear_megatron.train.profile import StepProfile
from pear_megatron.train.reports import ReportSums
from pear_megatron.train.run_folder import RunFolder
from pear_megatron.train.start import start_model
from pear_megatron.train.stop import StopRequest
from pear_megatron.train.throughput import Throughput
from pear_megatron.train.weights_and_biases import start_wandb
from pear_megatron.watch import now


class Trainer:
    """One run on this rank; it is enough that one rank's ``stop`` asks it to stop early.

    Raises:
        RecipeError, DataError, CheckpointError: before the first step, on every rank.
    """

    def __init__(self, recipe: Recipe, layout: Layout, stop: StopRequest | None = None) -> None:
        self.recipe, self.layout, self.stop = recipe, layout, stop or StopRequest()
        optimizer_config(recipe)  # refuses what this machine has not, before data are read
        if recipe.train.output_chunk_tokens is not None:
            require_output_processor(gpt_class())
        root = Path(recipe.output_dir) / "checkpoints"
        saved = resume.find(recipe, root)
        self.wandb = start_wandb(recipe)  # before data and weights, which take long
        self.dataset = open_dataset(recipe)
        self.sources = source_names(self.dataset)
        held_out = open_validation(recipe, self.dataset)
        self.saver = CheckpointSaver(
            root,
            layout,
            keep_last=recipe.checkpoint.keep_last,
            asynchronous=recipe.checkpoint.async_save,
            on_commit=lambda step: self.exports(step),
        )
        self.position = DataPosition.of(recipe, self.dataset, layout)
        if saved:
            saved, data = resume.read(recipe, root, saved)
            self.position = self.position.resumed(data)
        self.plan = plan_batches(
            recipe.data,
            self.dataset,
            global_batch_size=recipe.train.global_batch_size,
            seed=recipe.seed,
            multiple=self.position.multiple,
        )
        self.total_steps = recipe.train.max_steps or self.plan.first_step(recipe.train.num_epochs)
        self.routes = recipe.model.num_moe_experts is not None
        self.profile = StepProfile(recipe, layout, self.total_steps)

        if layout.tp_comm_overlap:
            start_userbuffers(recipe)
        chunks = build_chunks(recipe.model, layout, recipe.train)
        now("training: loading the weights")
        if not saved or recipe.lora:
            start_model(recipe, layout, chunks)
        if recipe.lora:
            add_adapters(chunks, recipe.model, recipe.lora, layout, seed=recipe.seed)
        self.model: list[Any] = wrap_ddp(
            chunks, recipe.parallel, grads_in_fp32=recipe.optimizer.main_grads_dtype == "fp32"
        )
        self.optimizer = build_optimizer(recipe, self.model)
        self.scheduler = build_scheduler(recipe, self.optimizer, self.total_steps)
        self.step = 0
        self.best = Best(recipe.checkpoint.keep_best, None if held_out is None else held_out.fingerprint())
        self.evaluated = False
        if saved:
            self.step = resume.load(root, saved, layout, self.model, self.optimizer, self.scheduler)
            common = read_common(checkpoint_path(root, self.step))
            self.evaluated = common.get("evaluated", False)
            self.best.load(common.get("best"))
        self.passes = Passes(
            self.dataset, self.plan, self._forward_step(self.dataset), layout, recipe.train.micro_batch_size
        )
        self.evaluation = None
        if held_out is not None:
            step = self._forward_step(held_out)
            self.evaluation = Evaluation(recipe, layout, held_out, step, multiple=self.position.multiple)
        self.exports = Exports(recipe, layout)
        self.throughput = Throughput(
            recipe.model,
            recipe.cluster,
            world_size=layout.world_size,
            device=layout.device,
            frozen=recipe.lora is not None,
        )

    def _forward_step(
        self, dataset: AnyDataset, kind: type[PearForwardStep] = PearForwardStep
    ) -> PearForwardStep:
        recipe = self.recipe
        return kind(
            recipe.pear,
            vocab_size=recipe.model.vocab_size,
            tp_group=self.layout.tp_group,
            cp_group=self.layout.cp_group,
            packed_attention=packed_attention(recipe.train),
            output_chunk_tokens=recipe.train.output_chunk_tokens,
            normalization=recipe.train.loss_normalization,
            num_sources=len(source_names(dataset)),
        )

    def train(self) -> bool:
        """Trains to the last step, or to the step at which a rank is asked to stop; saves there.

        False if the run was asked to stop, and waits in output_dir for going on.

        Raises:
            DataError, TrainingError, CheckpointError: on every rank.
        """
        if self.layout.is_main:
            announce(self)
        if self.best.metric is not None and self.saver.keep_best(self.best.step) != self.best.step:
            self.best.forget()
        self.exports.begin(self.step, self.total_steps)
        if self.step >= self.total_steps:
            return True
        now("training: the first step")
        if self.step == 0:
            passes = replace(self.passes, forward_step=self._forward_step(self.dataset, AlignmentStep))
            check_alignment(self.recipe, self.layout, self.model, passes)
        self.stop.saves(self.saver.folder.root)
        run: RunFolder | None = None

        def begin() -> None:
            nonlocal run
            run = RunFolder(self.recipe, start_step=self.step, total_steps=self.total_steps, wandb=self.wandb)

        from_main(begin)
        try:
            finished = self._train_steps(run)
            self.saver.finish()
        except BaseException:
            self.saver.abort()
            raise
        finally:
            self.profile.close()
            if run is not None:
                run.close()
        if self.layout.is_main:
            say_goodbye(self, finished)
        return finished

    def _train_steps(self, run: RunFolder | None) -> bool:
        for chunk in self.model:
            chunk.train()
        interval = self.recipe.checkpoint.save_interval
        stop_asked = self._stop_asked()
        saved = self.step
        watch = watch_weights(self.recipe.pear, self.sources)
        found = self._evaluate(stop_asked)
        if found and run is not None:
            run.log_evaluation(self.step, found)
        if found and self.best.update(self.step, found):
            self._save(best=True)
        while self.step < self.total_steps and not stop_asked:
            with self.profile.step(self.step + 1):
                metrics, stop_asked = self._train_step()
            found = self._evaluate(stop_asked)
            if run is not None:
                run.log_step({**metrics, **found})
                watch(metrics)
            self.saver.poll()
            better = bool(found) and self.best.update(self.step, found)
            if better or (interval is not None and self.step % interval == 0):
                self._save(best=better)
                saved = self.step
        if saved != self.step:
            self._save()
        return self.step >= self.total_steps

    def _evaluate(self, stop_asked: bool) -> dict[str, float]:
        """The metrics of an evaluation, where one is due; a run that is to stop catches up when it goes on."""
        evaluation = self.evaluation
        if evaluation is None or self.evaluated or not evaluation.due(self.step, self.total_steps):
            return {}
        if stop_asked and self.step < self.total_steps:
            return {}
        self.evaluated = True
        now(f"training: evaluating after step {self.step}")
        return evaluation(self.model)

    def _stop_asked(self) -> bool:
        """Whether any rank was asked to stop before the first step."""
        asked = torch.tensor(float(self.stop.requested), device=self.layout.device)
        torch.distributed.all_reduce(asked)
        return bool(asked)

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
            self._start_routers(planned, sum(lengths))
        reports = self.passes.run(self.model, self.step)
        sums = ReportSums(self.layout, self.recipe.pear, self.sources)
        sums.add(reports)
        reduced = sums.reduce(flag=self.stop.requested)
        means = dict(reduced.means)
        if not math.isfinite(means["loss"]):
            self.saver.finish()
            raise_not_finite(
                means["loss"],
                self.step + 1,
                reports,
                self.passes.micro_batches(self.step),
                self.dataset,
                self.layout,
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
        self.evaluated = False
        seconds = time.perf_counter() - started
        metrics = {
            "step": self.step,
            "epoch": epoch,
            "loss": means.pop("loss"),
            "grad_norm": float(grad_norm),
            "lr": lr,
            **self.throughput(lengths, seconds),
            "tokens": sum(lengths),
            "decisions": reduced.decisions,
            "trajectories": digest([i for row in planned for i in row]),
            **means,
            **(self._router_losses(sum(lengths)) if self.routes else {}),
            **self._epochs_of_sources(),
        }
        return metrics, reduced.flagged

    def _start_routers(self, planned: Any, tokens: int) -> None:
        """Tells the routers what the step's gradients are divided by: what the loss's normalization counts."""
        decisions = [int(self.dataset.num_decisions[i]) for row in planned for i in row]
        by_token = self.recipe.train.loss_normalization == "token"
        divisor = sum(decisions) if by_token else sum(n > 0 for n in decisions)
        moe.start_step(self.model, divisor=max(divisor, 1), tokens=tokens)

    def _router_losses(self, tokens: int) -> dict[str, float]:
        """The routers' losses without their coefficients, means over layers and the step's tokens, on every rank."""
        sums = moe.step_sums(self.model, self.layout.device)
        torch.distributed.all_reduce(sums)
        count = tokens * self.recipe.model.num_layers
        kinds = (self.recipe.train.moe_aux_loss_coeff, self.recipe.train.moe_z_loss_coeff)
        means = zip(moe.METRICS, (sums / max(count, 1)).tolist(), kinds, strict=True)
        return {name: mean for name, mean, coefficient in means if coefficient}

    def _epochs_of_sources(self) -> dict[str, float]:
        """How often each source was gone through so far."""
        if not isinstance(self.dataset, TrajectoryBlend):
            return {}
        drawn = self.plan.drawn(self.step, self.dataset.offsets)
        sizes = map(len, self.dataset.datasets)
        passes = zip(self.sources, drawn.tolist(), sizes, strict=True)
        return {f"source/{name}/epoch": number / size for name, number, size in passes}

    def _save(self, *, best: bool = False) -> None:
        now(f"training: saving step {self.step}")
        sync_parameters(self.model)
        common = {
            "data": asdict(self.position),
            "use_distributed_optimizer": self.recipe.parallel.use_distributed_optimizer,
            "evaluated": self.evaluated,
            "best": self.best.state(),
        }
        self.saver.save(self.step, self.model, self.optimizer, self.scheduler, common, best=best)
