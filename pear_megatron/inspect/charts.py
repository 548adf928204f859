"""The page's charts: distributions, weight against position, one policy against the other, shifts."""

from __future__ import annotations

import numpy as np

from pear_megatron.alignment import Alignment
from pear_megatron.config import PearConfig
from pear_megatron.inspect.measure import Pack, Weights
from pear_megatron.inspect.svg import Axis, Plot

_BINS = 48
_POSITIONS = 60
_BANDS = ((10, 90, "band outer"), (25, 75, "band inner"))


def clipped_quantity(pack: Pack, config: PearConfig) -> np.ndarray:
    """Float32 [decisions]: what ``log_ratio_clip`` is applied to, the log ratio or what the baseline leaves."""
    if config.baseline == "none":
        return pack.log_ratio
    sums = np.bincount(pack.segment, pack.log_ratio.astype(np.float64), minlength=len(pack.reward))
    return (pack.log_ratio - (sums / np.maximum(pack.num_decisions, 1))[pack.segment]).astype(np.float32)


def log_ratios(pack: Pack, config: PearConfig) -> str:
    """Distribution of the log ratio, with the clip."""
    values = clipped_quantity(pack, config)
    low, high = config.log_ratio_clip
    margin = (high - low) / 2
    left, right = np.quantile(values, (0.05, 0.95))
    left, right = min(float(left), low - margin), max(float(right), high + margin)
    label = "log ratio: policy minus behaviour" + (", minus its mean" if config.baseline != "none" else "")
    plot = _histogram("Log ratio", values, pack, left, right, f"{label} (the ends gather what is beyond)")
    plot.vertical(low, f"clip {low:g}", left=True)
    plot.vertical(high, f"clip {high:g}", left=False)
    return plot.svg()


def weights(pack: Pack, measured: Weights) -> str:
    """Distribution of the weight, on a logarithmic axis, with floor and ceiling."""
    values = _decades(measured.weight)
    left, right = float(values.min()), float(values.max())
    plot = _histogram("Weight", values, pack, left - 0.1, max(right, 0.0) + 0.1, "weight", decades=True)
    floor, ceiling = measured.config.log_weight_clip
    plot.vertical(floor / np.log(10.0), "floor", left=False)
    plot.vertical(ceiling / np.log(10.0), "ceiling", left=True)
    return plot.svg()


def effective_sample_sizes(pack: Pack, measured: Weights) -> str:
    """Distribution over trajectories of the share of decisions that count."""
    plot = Plot(
        Axis(0.0, 1.0, "effective sample size / decisions, per trajectory", percent=True),
        Axis(0.0, 1.0, "trajectories", percent=True),
        "Effective sample size",
    )
    has = pack.num_decisions > 0
    _bars(plot, measured.effective_sample_size[has], pack.reward[has], np.linspace(0, 1, 26))
    return plot.svg()


def behavior(pack: Pack) -> str:
    """Distribution of the behaviour policy's log-probs."""
    left = min(float(np.quantile(pack.lb, 0.005)), -0.5)
    label = "log-prob of a decision under the policy that wrote it (left end: and below)"
    return _histogram("Behaviour log-probs", pack.lb, pack, left, 0.0, label).svg()


def lengths(num_decisions: np.ndarray, rewards: np.ndarray) -> str:
    """Distribution of the number of decisions of a trajectory."""
    high = float(num_decisions.max())
    plot = Plot(
        Axis(0.0, high, "decisions of a trajectory"),
        Axis(0.0, 1.0, "trajectories", percent=True),
        "Response length",
    )
    _bars(plot, num_decisions.astype(np.float64), rewards, np.linspace(0, high, 31))
    return plot.svg()


def position_from_end(pack: Pack, measured: Weights) -> str:
    """Weight against the number of decisions that follow: median and bands, with two yardsticks."""
    after = pack.num_decisions[pack.segment] - 1 - pack.position
    longest = int(after.max())
    edges = np.unique(np.linspace(0, longest + 1, min(_POSITIONS, longest + 1) + 1).astype(int))
    x = Axis(float(longest), 0.0, "decisions that follow (the response ends at the right)")
    plot, config = _against(measured, after, edges, x, "Weight and place, from the end"), measured.config
    if config.variant in ("token", "block") and config.normalize == "none" and longest:
        k = np.linspace(0, longest, 80)
        bounds = np.array(config.log_weight_clip) / np.log(10.0)
        for rate, css, text in (
            (0.0, "yardstick", "discount alone"),
            (config.log_ratio_clip[0], "yardstick low", "every ratio at the low clip"),
        ):
            ys = np.clip(k * (rate + np.log(config.gamma)) / np.log(10.0), *bounds)
            plot.line(k.tolist(), ys.tolist(), css, cut=True)
            plot.name(css, text)
    return plot.svg()


def relative_position(pack: Pack, measured: Weights) -> str:
    """Weight against the place in the response: median and bands."""
    relative = (pack.position + 0.5) / pack.num_decisions[pack.segment]
    x = Axis(0.0, 1.0, "place in the response", percent=True)
    title = "Weight and place, relative"
    return _against(measured, relative, np.linspace(0, 1, 26), x, title).svg()


def one_against_the_other(pack: Pack, alignment: Alignment) -> str:
    """Density of decisions over both log-probs; on the diagonal the two policies agree."""
    low = min(float(np.quantile(np.concatenate([pack.lp, pack.lb]), 0.01)), -1.0)
    cells = 36
    edges = np.linspace(low, 0.0, cells + 1)
    counts, _, _ = np.histogram2d(np.clip(pack.lb, low, 0), np.clip(pack.lp, low, 0), bins=(edges, edges))
    plot = Plot(
        Axis(low, 0.0, "behaviour log-prob"),
        Axis(low, 0.0, "policy log-prob"),
        f"Policy and behaviour (correlation {alignment.correlations[0]:.2f})",
        height=300,
    )
    peak = np.sqrt(counts.max())
    for i, j in zip(*np.nonzero(counts), strict=True):
        share = np.sqrt(counts[i, j]) / peak
        tip = f"{int(counts[i, j])} decisions"
        plot.rectangle(edges[i], edges[i + 1], edges[j], edges[j + 1], "plus", tip, 0.08 + 0.92 * share)
    plot.line([low, 0.0], [low, 0.0], "yardstick")
    return plot.svg()


def shifts(alignment: Alignment) -> str:
    """Correlation of the two policies' log-probs at every shift."""
    r = alignment.correlations
    low = min(0.0, *r.values())
    plot = Plot(
        Axis(min(r) - 0.5, max(r) + 0.5, "behaviour log-probs taken this many decisions later"),
        Axis(low, 1.0, "correlation"),
        "Are the log-probs at the right tokens?",
        height=300,
    )
    for shift, value in r.items():
        css = "minus" if shift == alignment.shift != 0 else "plus" if shift == 0 else "other"
        plot.rectangle(shift - 0.38, shift + 0.38, 0.0, value, css, f"shift {shift:+d}: {value:.3f}")
    return plot.svg()


def _decades(weight: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(weight.astype(np.float64), 1e-30))


def _histogram(
    title: str,
    values: np.ndarray,
    pack: Pack,
    left: float,
    right: float,
    label: str,
    *,
    decades: bool = False,
) -> Plot:
    plot = Plot(Axis(left, right, label, decades=decades), Axis(0.0, 1.0, "decisions", percent=True), title)
    inside = np.clip(values, left, right)
    _bars(plot, inside, pack.reward[pack.segment], np.linspace(left, right, _BINS + 1))
    return plot


def _bars(plot: Plot, values: np.ndarray, reward: np.ndarray, edges: np.ndarray) -> None:
    """Bars of the shares of all values; negative examples stand on top of the others."""
    negative = reward < 0
    below, _ = np.histogram(values[negative], edges)
    above, _ = np.histogram(values[~negative], edges)
    total = max(len(values), 1)
    plot.rescale(float((below + above).max()) / total * 1.05)
    for i in range(len(edges) - 1):
        base = 0.0
        for count, css, what in ((above[i], "plus", ""), (below[i], "minus", " of negative examples")):
            if count:
                share = float(count) / total
                tip = f"{edges[i]:.4g} to {edges[i + 1]:.4g}: {share:.2%}{what}"
                plot.rectangle(edges[i], edges[i + 1], base, base + share, css, tip)
                base += share
    if negative.any():
        plot.name("plus", "reward at least 0")
        plot.name("minus", "negative examples")


def _against(measured: Weights, place: np.ndarray, edges: np.ndarray, x: Axis, title: str) -> Plot:
    """Quantiles of the weight in bins of ``place``."""
    values = _decades(measured.weight)
    which = np.clip(np.digitize(place, edges) - 1, 0, len(edges) - 2)
    order = np.argsort(which, kind="stable")
    groups = np.split(values[order], np.searchsorted(which[order], np.arange(1, len(edges) - 1)))
    wanted = [10, 25, 50, 75, 90]
    rows = [(i, np.percentile(group, wanted)) for i, group in enumerate(groups) if len(group)]
    table = dict(zip(wanted, np.array([q for _, q in rows]).T, strict=True))
    step = edges.dtype.kind == "i"
    middles = [(edges[i] + edges[i + 1] - (1 if step else 0)) / 2 for i, _ in rows]
    low, high = float(table[10].min()), float(table[90].max())
    plot = Plot(x, Axis(min(low, -0.3) - 0.05, max(high, 0.0) + 0.1, "weight", decades=True), title)
    for below, above, css in _BANDS:
        plot.band(middles, table[below].tolist(), table[above].tolist(), css)
    plot.line(middles, table[50].tolist(), "median")
    plot.name("median", "median, 25-75 %, 10-90 %")
    return plot
