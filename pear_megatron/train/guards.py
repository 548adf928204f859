"""What stops a run when its numbers say that it trains nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from pear_megatron.data import AnyDataset, PackedBatch
from pear_megatron.errors import PearError
from pear_megatron.megatron.layout import Layout


class TrainingError(PearError, RuntimeError):
    """Training cannot go on: the message says at which step, why, and what to try."""


def raise_not_finite(
    loss: float,
    step: int,
    reports: list[dict[str, torch.Tensor]],
    batches: Iterable[PackedBatch],
    dataset: AnyDataset,
    layout: Layout,
) -> NoReturn:
    """Names the trajectories behind a loss that is not finite at a step, counted from 1; every rank calls it."""
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


def raise_bad_gradient(norm: float, step: int, rows: list[list[int]], dataset: AnyDataset) -> NoReturn:
    """Stops a run whose loss is finite and whose gradient is not, before the weights that it made are saved."""
    ids = [dataset[i].id for row in rows for i in row]
    raise TrainingError(
        f"the gradient's norm is {norm} at step {step} and the loss is finite; nothing was saved since the last "
        f"checkpoint. Trajectories of the step: {', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''}. Lower "
        "optimizer.lr or optimizer.clip_grad, or train with train.precision=fp32"
    )
