"""What a run says of itself before it begins, and at its end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from pear_megatron.config import SUGGESTED_NEGATIVE_FLOOR, PearConfig
from pear_megatron.data import AnyDataset, BatchPlan, TrajectoryBlend
from pear_megatron.data.sources import blend_of
from pear_megatron.megatron.checkpoint.folder import CheckpointFolder
from pear_megatron.megatron.checkpoint.paths import checkpoint_path
from pear_megatron.megatron.layout import Layout
from pear_megatron.recipe import Recipe
from pear_megatron.train.stop import leave_requeue_file

if TYPE_CHECKING:
    from pear_megatron.train.trainer import Trainer

log = logging.getLogger("pear_megatron")


def announce(trainer: Trainer) -> None:
    """What is trained, on what, for how long, and which checkpoints stay."""
    recipe, step, total_steps = trainer.recipe, trainer.step, trainer.total_steps
    if step >= total_steps:
        asked = "" if step == total_steps else f", and this command asks for {total_steps}"
        log.info("nothing to do: %s is at step %d already%s", recipe.output_dir, step, asked)
        return
    what = _method(recipe.pear)
    log.info(
        "%s: %d trajectories, %d decisions; %s on %s; steps %d to %d",
        what,
        len(trainer.dataset),
        trainer.dataset.num_decisions.sum(),
        _sizes(trainer.layout),
        trainer.layout.device.type.upper(),
        step,
        total_steps,
    )
    announce_rewards(recipe.pear, trainer.dataset.rewards)
    _announce_sources(recipe, trainer.dataset, trainer.plan, total_steps)
    if trainer.evaluation is not None:
        log.info("evaluations on %d held-out trajectories", len(trainer.evaluation.dataset))
    if step == 0 and not (recipe.model.hf or recipe.checkpoint.pretrained):
        log.warning(
            "the model starts from random weights: neither model.hf nor checkpoint.pretrained is given; to train a "
            "model that you have, add model.hf=FOLDER"
        )
    _announce_checkpoints(recipe, trainer.saver.folder, step)


def _method(pear: PearConfig) -> str:
    if pear.variant != "none":
        return f"PEAR {pear.variant}"
    if pear.base_loss == "kl":
        return "distillation"
    return "SFT with factors" if pear.has_factors else "plain SFT"


def announce_rewards(pear: PearConfig, rewards: np.ndarray) -> None:
    """Warns of rewards [N] of 0, of negative examples that nothing stops, and of settings that find none."""
    if count := int((rewards == 0).sum()):
        log.warning(
            "%d of %d trajectories have reward 0: they train nothing, and their tokens count in the mean all the same, "
            "so that steps are smaller; leave them out, or make them negative examples by a reward below zero",
            count,
            len(rewards),
        )
    if count := int((rewards < 0).sum()):
        if pear.negative_floor is None and pear.negative_scale:
            log.warning(
                "%d of %d trajectories have a reward below zero, and nothing stops their push, which did harm in one "
                "world of our study; pear.negative_floor=%g did none (docs/weights.md)",
                count,
                len(rewards),
                SUGGESTED_NEGATIVE_FLOOR,
            )
        return
    for name, idle in (("negative_floor", None), ("negative_scale", 1.0)):
        if (value := getattr(pear, name)) != idle:
            log.warning(
                "pear.%s=%g does nothing: no trajectory has a reward below zero; leave it out, or check the data's "
                "rewards",
                name,
                value,
            )


def _sizes(layout: Layout) -> str:
    sizes = {"TP": layout.tp_size, "PP": layout.pp_size, "VPP": layout.vpp_size, "CP": layout.cp_size}
    sizes["EP"] = layout.ep_size
    used = [f"{name} {n}" for name, n in {**sizes, "DP": layout.dp_size}.items() if n > 1]
    return " x ".join(used) or "one process"


def _announce_sources(recipe: Recipe, dataset: AnyDataset, plan: BatchPlan, total_steps: int) -> None:
    """How often the run goes through each source, to the precision of an epoch's last batch."""
    if not isinstance(dataset, TrajectoryBlend):
        return
    blend = blend_of(recipe.data, dataset)
    epochs = total_steps / plan.steps_per_epoch()
    for number, (source, part) in enumerate(zip(recipe.data.train_sources, dataset.datasets, strict=True)):
        passes = epochs * (1.0 if blend is None else blend.draws[number] / len(part))
        weight = "no weight" if source.weight is None else f"weight {source.weight:g}"
        log.info(
            "source %s: %d trajectories, %d decisions, %s: %.3g epochs of it in %d steps",
            source.name,
            len(part),
            part.num_decisions.sum(),
            weight,
            passes,
            total_steps,
        )


def _announce_checkpoints(recipe: Recipe, folder: CheckpointFolder, step: int) -> None:
    settings = recipe.checkpoint
    if settings.keep_last is None:
        return
    if surplus := folder.surplus(step):
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


def say_goodbye(trainer: Trainer, finished: bool) -> None:
    """Where the run is saved; one that was stopped leaves its requeue file."""
    folder = checkpoint_path(trainer.saver.folder.root, trainer.step)
    best = trainer.best
    if best.step is not None:
        log.info("best: step %d, %s %.6g: %s", best.step, best.metric, best.value, folder.parent / "best")
    if finished:
        log.info("done: %s", folder)
        return
    message = f"stopped at step {trainer.step} of {trainer.total_steps}"
    leave_requeue_file(trainer.recipe.output_dir, message)
    if trainer.step:
        log.info("%s, and saved; the same command goes on: %s", message, folder)
    else:
        log.info("stopped before the first step, with nothing to save; the same command starts again")
