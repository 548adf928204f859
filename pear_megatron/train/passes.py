"""Passes: Megatron's schedule over a global batch of this rank's micro-batches, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pear_megatron.data import AnyDataset, BatchPlan, PackedBatch, micro_batches, num_micro_batches
from pear_megatron.megatron.forward_step import PearForwardStep
from pear_megatron.megatron.layout import Layout
from pear_megatron.megatron.schedule import run_schedule


@dataclass(frozen=True)
class Passes:
    """The global batches of a plan on this rank.

    Attributes:
        dataset: the trajectories.
        plan: which of them a step sees.
        forward_step: Megatron's forward step function.
        layout: where this rank stands.
        micro_batch_size: rows in a micro-batch.
    """

    dataset: AnyDataset
    plan: BatchPlan
    forward_step: PearForwardStep
    layout: Layout
    micro_batch_size: int

    def micro_batches(self, step: int) -> Iterator[PackedBatch]:
        """This rank's part of a step's global batch, on the CPU."""
        return micro_batches(
            self.dataset,
            self.plan,
            step,
            dp_rank=self.layout.dp_rank,
            dp_size=self.layout.dp_size,
            micro_batch_size=self.micro_batch_size,
            cp_rank=self.layout.cp_rank,
            cp_size=self.layout.cp_size,
        )

    def run(self, chunks: list[Any], step: int, *, forward_only: bool = False) -> list[dict[str, Tensor]]:
        """Forward and, unless ``forward_only``, backward -> the micro-batches' reports, on the last pipeline stage."""
        return run_schedule(
            self.forward_step,
            (batch.to(self.layout.device, non_blocking=True) for batch in self.micro_batches(step)),
            chunks,
            count=num_micro_batches(self.plan.global_batch_size, self.layout.dp_size, self.micro_batch_size),
            shape=(self.micro_batch_size, self.plan.seq_length),
            flat=self.forward_step.packed_attention == "thd",
            forward_only=forward_only,
        )


@contextmanager
def evaluating(chunks: list[Any]) -> Iterator[None]:
    """Within it forward passes keep nothing, and nothing is recomputed; training mode comes back after it."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        yield
    for chunk, mode in zip(chunks, modes, strict=True):
        chunk.train(mode)
