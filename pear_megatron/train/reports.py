"""ReportSums: the loss function's reports of many micro-batches as means over all of them, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pear_megatron.config import PearConfig
from pear_megatron.loss import BY_SOURCE, report_keys
from pear_megatron.megatron.layout import Layout


@dataclass(frozen=True)
class Reduced:
    """What ``ReportSums.reduce`` gives, alike on every rank.

    Attributes:
        means: report_keys(config) -> ratios of global sums, and ``source/NAME/...`` of each source, with its
            ``decisions``.
        decisions: that were counted.
        flagged: whether any rank gave the flag.
    """

    means: dict[str, float]
    decisions: int
    flagged: bool


class ReportSums:
    """Adds up reports on the device; nothing waits for it before ``reduce``, which is one collective.

    ``sources`` are the names of a blend's; none = they are not told apart.
    """

    def __init__(self, layout: Layout, config: PearConfig, sources: Sequence[str] = ()) -> None:
        self._layout, self._keys, self._sources = layout, report_keys(config), list(sources)
        rows = (1 + len(self._sources)) * len(self._keys) + 1
        self._sums = torch.zeros((rows, 2), dtype=torch.float64, device=layout.device)

    def add(self, reports: Sequence[dict[str, Tensor]]) -> None:
        """Adds what run_schedule returned; on ranks whose loss does not count, nothing."""
        for report in reports if self._layout.reports else []:
            rows = torch.stack([report[key] for key in self._keys])
            if self._sources:
                rows = torch.cat([rows, report[BY_SOURCE].flatten(0, 1)])
            self._sums[:-1] += rows

    def reduce(self, *, flag: bool = False) -> Reduced:
        """The means over all that was added, on all ranks; ``flag`` of one of them is told to all."""
        self._sums[-1, 0] = float(flag)
        torch.distributed.all_reduce(self._sums)
        values = self._sums.tolist()
        means, decisions = self._means(values), round(values[self._keys.index("nll")][1])
        for number, name in enumerate(self._sources, 1):
            part = values[number * len(self._keys) :]
            of_source = {"decisions": round(part[self._keys.index("nll")][1]), **self._means(part)}
            means |= {f"source/{name}/{key}": value for key, value in of_source.items()}
        return Reduced(means, decisions, values[-1][0] > 0)

    def _means(self, values: Sequence[Sequence[float]]) -> dict[str, float]:
        pairs = zip(self._keys, values, strict=False)
        return {key: total / count if count else 0.0 for key, (total, count) in pairs}
