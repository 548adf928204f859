"""What stops a run, or speaks up, when its numbers say that it trains nothing."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from pear_megatron.config import PearConfig
from pear_megatron.data import PackedBatch, TrajectoryDataset
from pear_megatron.errors import PearError
from pear_megatron.megatron.layout import Layout
from pear_megatron.recipe import Recipe

log = logging.getLogger("pear_megatron")

# The sane band of what WeightWatch looks at, a mean over this many steps.
_WINDOW = 4
_LARGEST_MEAN_WEIGHT = 3.0
_SMALLEST_EFFECTIVE_SAMPLE = 0.1


class TrainingError(PearError, RuntimeError):
    """Training cannot go on: the message says at which step, why, and what to try."""


def raise_not_finite(
    loss: float,
    step: int,
    reports: list[dict[str, torch.Tensor]],
    batches: Iterable[PackedBatch],
    dataset: TrajectoryDataset,
    layout: Layout,
) -> NoReturn:
    """Names the trajectories behind a loss that is not finite; called by every rank.

    Args:
        loss: the global batch's.
        step: counted from 1.
        reports: of this rank's micro-batches, where it has the loss.
        batches: this rank's micro-batches.
        dataset: what their indices point into.
        layout: where this rank stands.

    Raises:
        TrainingError: always.
    """
    found = []
    if layout.reports:
        for batch, report in zip(batches, reports, strict=True):
            if not torch.isfinite(report["loss"]).all():
                found += [dataset[int(i)].id for i in batch.trajectory_index if i >= 0]
    everyone: list[Any] = [None] * layout.world_size
    torch.distributed.all_gather_object(everyone, (layout.rank, found))
    where = "; ".join(f"rank {rank}: {', '.join(ids[:8])}" for rank, ids in everyone if ids)
    raise TrainingError(
        f"loss is {loss} at step {step}; the weights were not updated. Trajectories of the "
        f"micro-batches with a non-finite loss: {where or 'none found'}. Look at them, lower "
        "optimizer.lr or optimizer.clip_grad, or train with train.precision=fp32"
    )


def raise_bad_gradient(norm: float, step: int, rows: list[list[int]], dataset: TrajectoryDataset) -> NoReturn:
    """Stops a run whose loss is finite and whose gradient is not, before the weights that it made are saved.

    Args:
        norm: of the gradient, alike on every rank.
        step: counted from 1.
        rows: the trajectories of the step.
        dataset: what their indices point into.

    Raises:
        TrainingError: always.
    """
    ids = [dataset[i].id for row in rows for i in row]
    raise TrainingError(
        f"the gradient's norm is {norm} at step {step} and the loss is finite; nothing was saved since the last "
        f"checkpoint. Trajectories of the step: {', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''}. Lower "
        "optimizer.lr or optimizer.clip_grad, or train with train.precision=fp32"
    )


def warn_of_collapse(metrics: dict[str, Any], recipe: Recipe) -> None:
    """Says, now and then, that most weights are at one of their bounds."""
    step, low, high = metrics["step"], metrics["pear/weight_at_floor"], metrics["pear/weight_at_ceiling"]
    if recipe.pear.variant == "none" or not (step == 1 or step % 50 == 0):
        return
    if low > 0.5:
        log.warning(
            "step %d: %.0f%% of the weights are at their floor (exp of pear.log_weight_clip[0]): most tokens "
            "train nothing. The model finds the data unlikely; try pear.baseline=sequence_mean with a clip as "
            "wide below as above (pear.log_ratio_clip=[-0.08,0.08]), and look at it with `pear-megatron inspect`",
            step,
            100 * low,
        )
    if high > 0.5:
        log.warning(
            "step %d: %.0f%% of the weights are at their ceiling (exp of pear.log_weight_clip[1]): those tokens "
            "count alike, as in plain SFT. Try pear.log_ratio_clip with an upper bound no wider than the lower "
            "one, and look at it with `pear-megatron inspect`",
            step,
            100 * high,
        )


class WeightWatch:
    """Warns when the mean weight or the effective sample size leaves a sane band (docs/weights.md).

    Looks at means over four steps; says each once, and again only when it has doubled (halved) since.

    Args:
        config: the run's.
    """

    def __init__(self, config: PearConfig) -> None:
        self._config = config
        self._weights: deque[float] = deque(maxlen=_WINDOW)
        self._effective: deque[float] = deque(maxlen=_WINDOW)
        self._weight_said = _LARGEST_MEAN_WEIGHT / 2
        self._effective_said = _SMALLEST_EFFECTIVE_SAMPLE * 2

    def __call__(self, metrics: dict[str, Any]) -> None:
        """Looks at a step's metrics; a step without decisions says nothing of weights."""
        if self._config.variant == "none" or not metrics["decisions"]:
            return
        self._weights.append(metrics["pear/weight"])
        self._effective.append(metrics["pear/effective_sample_size"])
        weight = sum(self._weights) / len(self._weights)
        effective = sum(self._effective) / len(self._effective)
        if weight >= 2 * self._weight_said:
            self._weight_said = weight
            self._warn_of_growth(metrics["step"], weight)
        if effective <= self._effective_said / 2:
            self._effective_said = effective
            self._warn_of_few(metrics["step"], effective, weight)

    def _warn_of_growth(self, step: int, weight: float) -> None:
        low, high = self._config.log_ratio_clip
        remedies = ["lower optimizer.lr"]
        if high > -low > 0:
            remedies.append(f"slow it with pear.log_ratio_clip as wide below as above ([{low:g},{-low:g}])")
        if self._config.variant != "sequence":
            remedies.append("keep the mean at 1 with pear.normalize=sequence")
        floor = self._config.log_weight_clip[0]
        if floor < 0.7:
            remedies.append(f"bound every weight by 2 with pear.log_weight_clip=[{floor:g},0.7]")
        log.warning(
            "step %d: the mean weight is %.2g over the last steps, and the gradient grows with it: the model has "
            "moved away from the behaviour policy, and log ratios add up over a response. To change that, %s "
            "(docs/weights.md)",
            step,
            weight,
            "; or ".join(remedies),
        )

    def _warn_of_few(self, step: int, effective: float, weight: float) -> None:
        if weight < 1:
            where = "the last ones, since what follows the others is discounted or unlikely to the model"
            remedy = (
                "pear.baseline=sequence_mean with a clip as wide below as above, or pear.gamma nearer to 1"
            )
        else:
            where = "those whose continuation the model finds likelier than the behaviour policy did"
            remedy = "a lower optimizer.lr, a lower pear.log_weight_clip[1] or a narrower pear.log_ratio_clip"
        log.warning(
            "step %d: the effective sample size is %.2g: about %.2g%% of a trajectory's decisions carry its "
            "gradient, %s. Try %s, or pear.variant=sequence (docs/weights.md)",
            step,
            effective,
            100 * effective,
            where,
            remedy,
        )
