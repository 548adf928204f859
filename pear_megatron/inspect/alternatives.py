"""What other settings of ``pear:`` would give on the same trajectories: the decision a user has to make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import ValidationError

from pear_megatron.config import PearConfig
from pear_megatron.inspect.measure import Pack, weigh

_SUM = {"sequence_scale": "sum", "tau": 1.0}
_LOW = -0.3  # a wider lower clip: what a ratio of 0.74 and less counts


def weight_text(weight: float) -> str:
    """A weight as people read it: two significant digits, no exponent above 100."""
    return f"{weight:.0f}" if weight >= 100 else f"{weight:.2g}"


@dataclass(frozen=True)
class Alternative:
    """One row of the table.

    Attributes:
        overrides: how to ask for it, on top of the settings that were given; empty for those themselves.
        statistics: the means and shares that training logs as ``pear/...``.
        content: see ``Weights``.
        first_quarter, last_quarter: median weight of the first and last quarter of the responses.
        remedy: whether a verdict may advise it; another method is shown and not advised.
    """

    COLUMNS: ClassVar = (
        "mean weight", "ESS", "content", "floor", "ceiling", "low clip", "first 1/4", "last 1/4"
    )  # fmt: skip

    overrides: str
    statistics: dict[str, float]
    content: float
    first_quarter: float
    last_quarter: float
    remedy: bool = True

    @property
    def name(self) -> str:
        """What it is called in a table."""
        return self.overrides or "as given"

    @property
    def fall(self) -> float:
        """How many times the weights of the last quarter those of the first are; below 1 they rise."""
        return self.first_quarter / max(self.last_quarter, 1e-30)

    @property
    def at_bounds(self) -> int:
        """Share of weights at the floor or the ceiling, in percent."""
        return round(100 * (self.statistics["weight_at_floor"] + self.statistics["weight_at_ceiling"]))

    def cells(self) -> tuple[str, ...]:
        """The row's values as text, one per column."""
        s = self.statistics
        names = ("weight_at_floor", "weight_at_ceiling", "ratio_clipped_low")
        return (
            weight_text(s["weight"]),
            f"{s['effective_sample_size']:.0%}",
            f"{self.content:.2f}",
            *(f"{s[name]:.0%}" for name in names),
            weight_text(self.first_quarter),
            weight_text(self.last_quarter),
        )


def alternatives(pack: Pack, given: PearConfig) -> list[Alternative]:
    """The given settings first, then each change of them that changes anything."""
    relative = (pack.position + 0.5) / pack.num_decisions[pack.segment]
    rows, seen = [], set()
    methods = _methods(pack, given)
    for change in ({}, *_changes(given), *_level(pack, given), *methods):
        try:
            config = PearConfig.model_validate(given.model_dump() | change)
        except ValidationError:  # variant=sequence with normalize=sequence, or what needs another variant
            continue
        if config in seen:
            continue
        seen.add(config)
        measured = weigh(pack, config)
        quarters = (measured.weight[relative < 0.25], measured.weight[relative >= 0.75])
        first, last = (float(np.median(quarter)) if len(quarter) else 1.0 for quarter in quarters)
        overrides = _overrides(given, config)
        rows.append(
            Alternative(
                overrides, measured.statistics, measured.content, first, last, remedy=change not in methods
            )
        )
    return rows


def _changes(given: PearConfig) -> tuple[dict[str, Any], ...]:
    low, high = given.log_ratio_clip
    wider, even = (min(low, _LOW), high), (low, min(high, abs(low)))
    centred = {"baseline": "sequence_mean"}
    return (
        {"variant": "token"} | _SUM,
        {"variant": "block"} | _SUM,
        {"variant": "sequence"} | _SUM,
        *([{"sequence_scale": "mean"}] if given.variant == "sequence" else []),
        {"log_ratio_clip": wider},
        {"log_ratio_clip": even},
        centred,
        centred | {"log_ratio_clip": wider},
        centred | {"log_ratio_clip": even},
        {"normalize": "sequence"},
    )


def _level(pack: Pack, given: PearConfig) -> list[dict[str, Any]]:
    """A wide, centred clip with the discount at which a token's weight does not depend on its place.

    Each decision adds its clipped log ratio and log(gamma): where that is 0 on average, weights neither rise nor fall.
    """
    if given.variant not in ("token", "block"):
        return []
    low, high = min(given.log_ratio_clip[0], _LOW), max(given.log_ratio_clip[1], -_LOW)
    centred = pack.log_ratio - pack.means(pack.log_ratio)[pack.segment]
    drift = float(np.clip(centred, low, high).mean())
    if drift <= 0.0:  # gamma is at most 1
        return []
    gamma = round(float(np.exp(-drift)), 3)
    return [{"baseline": "sequence_mean", "log_ratio_clip": (low, high), "gamma": gamma}]


def _methods(pack: Pack, given: PearConfig) -> list[dict[str, Any]]:
    """What is another method and no remedy: a mean over the sequence, ratios against the initial model, DFT."""
    mean = {"variant": "sequence", "sequence_scale": "mean"}
    return [
        *([mean] if given.variant != "sequence" else []),
        *(
            [{"ratio": "reference"}]
            if pack.reference_logprobs is not None and given.variant != "none"
            else []
        ),
        {"variant": "none", "dft_power": 1.0} | _SUM,
    ]


def _overrides(given: PearConfig, config: PearConfig) -> str:
    old, new = given.model_dump(), config.model_dump()
    words = []
    for key, value in new.items():
        if value != old[key]:
            text = f"[{','.join(f'{v:g}' for v in value)}]" if isinstance(value, tuple) else value
            words.append(f"pear.{key}={text}")
    return " ".join(words)
