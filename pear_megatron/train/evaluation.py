"""Evaluation: what the loss and its weights are on held-out trajectories, while a run goes on."""

from __future__ import annotations

import time
from typing import Any

from pear_megatron.data import AnyDataset, BatchPlan
from pear_megatron.data.blend import source_names
from pear_megatron.megatron.forward_step import PearForwardStep
from pear_megatron.megatron.layout import Layout
from pear_megatron.megatron.model import sync_parameters
from pear_megatron.recipe import Recipe
from pear_megatron.train.passes import Passes, evaluating
from pear_megatron.train.reports import ReportSums


class Evaluation:
    """Forward passes over every held-out trajectory, once each; every rank calls it.

    Nothing that training depends on is touched: no gradient, no random number, no state of the optimizer. The forward
    step counts as training's does, and tells the sources of these trajectories apart.
    """

    def __init__(
        self,
        recipe: Recipe,
        layout: Layout,
        dataset: AnyDataset,
        forward_step: PearForwardStep,
        *,
        multiple: int,
    ) -> None:
        self.layout, self.dataset = layout, dataset
        self._config = recipe.pear
        self._interval, rows = recipe.train.eval_interval, recipe.train.micro_batch_size

        def plan(batch: int) -> BatchPlan:
            return BatchPlan(
                dataset.lengths,
                recipe.data.seq_length,
                batch,
                seed=recipe.seed,
                packing=recipe.data.packing,
                multiple=multiple,
            )

        # As many rows as training has at a time, but no more than are needed.
        stages = layout.pp_size if layout.vpp_size > 1 else 1
        unit = layout.dp_size * rows * stages
        needed = -(-plan(1).steps_per_epoch() // unit) * unit
        self.plan = plan(min(recipe.train.global_batch_size, needed))
        self._passes = Passes(dataset, self.plan, forward_step, layout, rows)

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the run is looked at after that many steps."""
        return step in (0, total_steps) or (self._interval is not None and step % self._interval == 0)

    def __call__(self, chunks: list[Any]) -> dict[str, float]:
        """Metrics by their names in metrics.jsonl, ``validation/...``, alike on every rank.

        Args:
            chunks: this rank's model chunks, in DDP.
        """
        started = time.perf_counter()
        sums = ReportSums(self.layout, self._config, source_names(self.dataset))
        sync_parameters(chunks)
        with evaluating(chunks):
            for step in range(self.plan.steps_per_epoch()):
                sums.add(self._passes.run(chunks, step, forward_only=True))
        reduced = sums.reduce()
        found = {**reduced.means, "decisions": reduced.decisions, "trajectories": len(self.dataset)}
        metrics = {f"validation/{key}": value for key, value in found.items()}
        return metrics | {"validation/seconds": time.perf_counter() - started}
