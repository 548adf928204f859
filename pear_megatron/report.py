"""What a loop's reports say about its weights: warnings when they collapse, or grow (docs/weights.md).

Messages name the settings of PearConfig as recipes do (``pear.log_ratio_clip``); other loops have the same settings
under names of their own (``--pear-log-ratio-clip``).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pear_megatron.config import PearConfig
from pear_megatron.loss import report_keys

log = logging.getLogger("pear_megatron")

# The sane band of what WeightWatch looks at, a mean over this many steps.
_WINDOW = 4
_LARGEST_MEAN_WEIGHT = 3.0
_SMALLEST_EFFECTIVE_SAMPLE = 0.1
_MOST = 0.9  # of the negative examples' decisions
_SAY_COLLAPSE_EVERY = 50  # steps


class WeightWatch:
    """Warns when most weights are at a bound, or their mean or the effective sample size leaves a sane band.

    Of the bounds it speaks at step 1 and every 50 steps; of the rest, which it averages over four steps, once, and
    again only when it has doubled (halved) since. Once it says when nearly all negatives have stopped.

    Args:
        config: the run's.
        place: how messages begin, with ``{}`` for the step.
    """

    def __init__(self, config: PearConfig, place: str = "step {}") -> None:
        self._config, self._place = config, place
        self._weights: deque[float] = deque(maxlen=_WINDOW)
        self._effective: deque[float] = deque(maxlen=_WINDOW)
        self._weight_said = _LARGEST_MEAN_WEIGHT / 2
        self._effective_said = _SMALLEST_EFFECTIVE_SAMPLE * 2
        self._stopped_said = False

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Looks at a step's ``step``, ``decisions`` and ``pear/...`` means; without decisions there are no weights."""
        if not metrics["decisions"]:
            return
        self._warn_of_stopped(metrics)
        if self._config.variant == "none":
            return
        self._warn_of_collapse(metrics)
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

    def _warn_of_collapse(self, metrics: Mapping[str, Any]) -> None:
        step, low, high = metrics["step"], metrics["pear/weight_at_floor"], metrics["pear/weight_at_ceiling"]
        if step != 1 and step % _SAY_COLLAPSE_EVERY:
            return
        if low > 0.5:
            log.warning(
                "%s: %.0f%% of the weights are at their floor (exp of pear.log_weight_clip[0]): most tokens "
                "train nothing. The model finds the data unlikely; try pear.baseline=sequence_mean with a clip as "
                "wide below as above (pear.log_ratio_clip=[-0.08,0.08]), and look at it with `pear-megatron inspect`",
                self._place.format(step),
                100 * low,
            )
        if high > 0.5:
            log.warning(
                "%s: %.0f%% of the weights are at their ceiling (exp of pear.log_weight_clip[1]): those tokens "
                "count alike, as in plain SFT. Try pear.log_ratio_clip with an upper bound no wider than the lower "
                "one, and look at it with `pear-megatron inspect`",
                self._place.format(step),
                100 * high,
            )

    def _warn_of_stopped(self, metrics: Mapping[str, Any]) -> None:
        share = metrics.get("pear/negative_stopped", 0.0)
        if share > _MOST and not self._stopped_said:
            self._stopped_said = True
            log.warning(
                "%s: %.0f%% of the decisions of negative examples have stopped: their log-probs are more than "
                "pear.negative_floor=%g below where they began, and they train nothing. Raise it if that is too early",
                self._place.format(metrics["step"]),
                100 * share,
                self._config.negative_floor,
            )

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
            "%s: the mean weight is %.2g over the last steps, and the gradient grows with it: the model has "
            "moved away from the behaviour policy, and log ratios add up over a response. To change that, %s "
            "(docs/weights.md)",
            self._place.format(step),
            weight,
            "; or ".join(remedies),
        )

    def _warn_of_few(self, step: int, effective: float, weight: float) -> None:
        if self._config.has_factors:
            where = "those that its factors leave (pear.dft_power, entropy_power, negative_floor)"
            remedy = "a smaller power, a larger pear.dft_floor or pear.negative_floor"
        elif weight < 1:
            where = "the last ones, since what follows the others is discounted or unlikely to the model"
            remedy = (
                "pear.baseline=sequence_mean with a clip as wide below as above, or pear.gamma nearer to 1"
            )
        else:
            where = "those whose continuation the model finds likelier than the behaviour policy did"
            remedy = "a lower optimizer.lr, a lower pear.log_weight_clip[1] or a narrower pear.log_ratio_clip"
        log.warning(
            "%s: the effective sample size is %.2g: about %.2g%% of a trajectory's decisions carry its "
            "gradient, %s. Try %s, or pear.variant=sequence (docs/weights.md)",
            self._place.format(step),
            effective,
            100 * effective,
            where,
            remedy,
        )


def watch_weights(config: PearConfig, sources: Sequence[str] = ()) -> Callable[[Mapping[str, Any]], None]:
    """A WeightWatch; or one for each source of a blend, which reads ``source/NAME/...`` and names it."""
    if not sources:
        return WeightWatch(config)
    watches = {f"source/{name}/": WeightWatch(config, f"step {{}}, source {name}") for name in sources}

    def watch(metrics: Mapping[str, Any]) -> None:
        for prefix, of_source in watches.items():
            own = {k.removeprefix(prefix): value for k, value in metrics.items() if k.startswith(prefix)}
            of_source({"step": metrics["step"], **own})

    return watch


class ReportWatch:
    """WeightWatch inside a loop that keeps its steps' means to itself: it sees one rank's micro-batches.

    Sums stay on their device; they are read, and the host waits for them, once every ``interval`` micro-batches.

    Args:
        config: the run's.
        interval: micro-batches that make a mean.
    """

    def __init__(self, config: PearConfig, interval: int = 16) -> None:
        self._watch = WeightWatch(config, f"after {{}} x {interval} of one rank's micro-batches")
        self._plain = config.variant == "none" and config.negative_floor is None
        self._interval = interval
        self._keys = report_keys(config)
        self._sums: Tensor | None = None
        self._seen = 0

    def __call__(self, report: Mapping[str, Tensor]) -> None:
        """Adds a micro-batch's report of [sum, count] tensors; one of an evaluation (no gradients) is left out."""
        if self._plain or not torch.is_grad_enabled():
            return
        sums = torch.stack([report[key].detach() for key in self._keys]).double()
        self._sums = sums if self._sums is None else self._sums + sums
        self._seen += 1
        if self._seen % self._interval:
            return
        values, self._sums = self._sums.tolist(), None
        pairs = dict(zip(self._keys, values, strict=True))
        means = {key: total / count if count else 0.0 for key, (total, count) in pairs.items()}
        self._watch({"step": self._seen // self._interval, "decisions": pairs["nll"][1], **means})
