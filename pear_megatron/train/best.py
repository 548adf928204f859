"""Best: which evaluation of a run was the best one so far, as its checkpoints remember it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("pear_megatron")

_HIGHER_IS_BETTER = ("validation/pear/effective_sample_size",)


class Best:
    """The best value of one metric.

    Args:
        metric: ``checkpoint.keep_best``; None = nothing is the best.
        data: fingerprint of the held-out trajectories that it is of.

    Attributes:
        step, value: of the best evaluation; None before the first one.
    """

    def __init__(self, metric: str | None, data: str | None = None) -> None:
        self.metric, self.data = metric, data
        self.step: int | None = None
        self.value: float | None = None

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the evaluation after ``step`` is better than all before; it is the best one then."""
        if self.metric is None or step == 0:  # the weights that a run starts from are there already
            return False
        value = metrics[self.metric]
        sign = -1 if self.metric in _HIGHER_IS_BETTER else 1
        if not math.isfinite(value) or (self.value is not None and not sign * value < sign * self.value):
            return False
        self.step, self.value = step, value
        return True

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"metric": self.metric, "data": self.data, "step": self.step, "value": self.value}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from a checkpoint's; not from one that was the best by another metric, or on other data."""
        if state is None or state["metric"] != self.metric or self.metric is None:
            return
        if state.get("data", self.data) != self.data:
            log.warning(
                "data.validation has other trajectories than the run had so far: the next evaluation is the best one "
                "(step %s had %s %.6g on the others)",
                state["step"],
                self.metric,
                state["value"] or math.nan,
            )
            return
        self.step, self.value = state["step"], state["value"]

    def forget(self) -> None:
        """The best one's checkpoint is gone: the next evaluation is the best one."""
        log.warning(
            "the best checkpoint so far (step %s, %s %.6g) is not there any more; the next evaluation is the best one",
            self.step,
            self.metric,
            self.value,
        )
        self.step = self.value = None
