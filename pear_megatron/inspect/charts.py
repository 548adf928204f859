"""The page's charts: distributions, weight against position, one policy against the other, shifts."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from pear_megatron.alignment import Alignment
from pear_megatron.config import PearConfig
from pear_megatron.inspect.measure import Pack, Weights
from pear_megatron.pages.figures import AXIS, BLUE, INK, ORANGE, new_figure, tidy

_BINS = 48
_POSITIONS = 60
_SIZE, _SQUARE = (4.3, 2.5), (4.3, 3.0)  # inches; a page's column at 400 px
_TEXT = 8


def clipped_quantity(pack: Pack, config: PearConfig) -> np.ndarray:
    """Float32 [decisions]: what ``log_ratio_clip`` is applied to, the log ratio or what the baseline leaves."""
    if config.baseline == "none":
        return pack.log_ratio
    return (pack.log_ratio - pack.means(pack.log_ratio)[pack.segment]).astype(np.float32)


def log_ratios(pack: Pack, config: PearConfig) -> Figure:
    """Distribution of the log ratio, with the clip."""
    values = clipped_quantity(pack, config)
    low, high = config.log_ratio_clip
    margin = (high - low) / 2
    left, right = np.quantile(values, (0.05, 0.95))
    edges = np.linspace(min(float(left), low - margin), max(float(right), high + margin), _BINS + 1)
    less = ", less its trajectory's mean" if config.baseline != "none" else ""
    figure, axes = _axes(
        f"log ratio: policy minus behaviour{less}\n(the outermost bars hold what lies beyond)"
    )
    _bars(axes, values, pack.reward[pack.segment], edges, "decisions")
    _mark(axes, low, f"clip {low:g}", left=True)
    _mark(axes, high, f"clip {high:g}", left=False)
    return _with_legend(figure)


def weights(pack: Pack, measured: Weights) -> Figure:
    """Distribution of the weight, on a logarithmic axis, with floor and ceiling."""
    values = _drawable(measured.weight)
    edges = np.geomspace(values.min() * 0.8, max(values.max(), 1.0) * 1.25, _BINS + 1)
    figure, axes = _axes("weight")
    axes.set_xscale("log")
    _bars(axes, values, pack.reward[pack.segment], edges, "decisions")
    _label_decades(axes, "x")
    for bound, name, left in zip(
        measured.config.log_weight_clip, ("floor", "ceiling"), (False, True), strict=True
    ):
        if edges[0] <= np.exp(bound) <= edges[-1]:
            _mark(axes, float(np.exp(bound)), f"{name} {np.exp(bound):.2g}", left=left)
    return _with_legend(figure)


def effective_sample_sizes(pack: Pack, measured: Weights) -> Figure:
    """Distribution over trajectories of the share of decisions that count."""
    figure, axes = _axes("effective sample size / decisions, per trajectory")
    has = pack.num_decisions > 0
    _bars(axes, measured.effective_sample_size[has], pack.reward[has], np.linspace(0, 1, 26), "trajectories")
    axes.xaxis.set_major_formatter(_percent)
    return _with_legend(figure)


def behavior(pack: Pack) -> Figure:
    """Distribution of the behaviour policy's log-probs."""
    left = min(float(np.quantile(pack.lb, 0.005)), -0.5)
    figure, axes = _axes(
        "log-prob of a decision under the policy that wrote it\n(the leftmost bar holds what lies below)"
    )
    _bars(axes, pack.lb, pack.reward[pack.segment], np.linspace(left, 0.0, _BINS + 1), "decisions")
    return _with_legend(figure)


def lengths(num_decisions: np.ndarray, rewards: np.ndarray) -> Figure:
    """Distribution of the number of decisions of a trajectory."""
    figure, axes = _axes("decisions of a trajectory")
    _bars(axes, num_decisions, rewards, np.linspace(0, float(num_decisions.max()), 31), "trajectories")
    return _with_legend(figure)


def position_from_end(pack: Pack, measured: Weights) -> Figure:
    """Weight against the number of decisions that follow: median and bands, with two yardsticks."""
    after = pack.num_decisions[pack.segment] - 1 - pack.position
    longest, config = int(after.max()), measured.config
    edges = np.unique(np.linspace(0, longest + 1, min(_POSITIONS, longest + 1) + 1).astype(int))
    figure, axes = _axes("decisions that follow (the response ends at the right)")
    _quantiles(axes, measured, after, edges, (edges[:-1] + edges[1:] - 1) / 2)
    axes.set_xlim(max(longest, 0.5), 0)
    if config.variant in ("token", "block") and config.normalize == "none" and longest:
        k, view = np.linspace(0, longest, 80), axes.get_ylim()
        floor, ceiling = np.exp(config.log_weight_clip)
        for rate, color, label in (
            (0.0, INK, "discount alone"),
            (config.log_ratio_clip[0], ORANGE, "every ratio at the low clip"),
        ):
            line = np.clip(np.exp(k * (rate + np.log(config.gamma))), floor, ceiling)
            axes.plot(k, line, color=color, linestyle="--", linewidth=1.1, label=label)
        axes.set_ylim(view)
    return _with_legend(figure)


def relative_position(pack: Pack, measured: Weights) -> Figure:
    """Weight against the place in the response: median and bands."""
    relative = (pack.position + 0.5) / pack.num_decisions[pack.segment]
    edges = np.linspace(0, 1, 26)
    figure, axes = _axes("place in the response")
    _quantiles(axes, measured, relative, edges, (edges[:-1] + edges[1:]) / 2)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(_percent)
    return _with_legend(figure)


def one_against_the_other(pack: Pack) -> Figure:
    """Density of decisions over both log-probs; on the diagonal the two policies agree."""
    low = min(float(np.quantile(np.concatenate([pack.lp, pack.lb]), 0.01)), -1.0)
    edges = np.linspace(low, 0.0, 37)
    counts, _, _ = np.histogram2d(np.clip(pack.lp, low, 0), np.clip(pack.lb, low, 0), bins=(edges, edges))
    colors = np.zeros((*counts.shape, 4))
    colors[...] = to_rgba(BLUE)
    colors[..., 3] = np.where(counts, 0.08 + 0.92 * np.sqrt(counts / counts.max()), 0.0)
    figure, axes = _axes("behaviour log-prob", "policy log-prob", _SQUARE)
    axes.imshow(colors, extent=(low, 0, low, 0), origin="lower", aspect="auto", interpolation="none")
    axes.plot([low, 0], [low, 0], color=INK, linestyle="--", linewidth=1.1, label="the two agree")
    axes.plot([], [], "s", color=BLUE, label="decisions (stronger: more of them)")
    return _with_legend(figure)


def shifts(alignment: Alignment) -> Figure:
    """Correlation of the two policies' log-probs at every shift; 0 and the best of the others have their number."""
    r = alignment.correlations
    figure, axes = _axes("behaviour log-probs taken this many decisions later", "correlation", _SQUARE)
    colors = [ORANGE if shift == alignment.shift != 0 else AXIS if shift else BLUE for shift in r]
    axes.bar(list(r), list(r.values()), width=0.76, color=colors)
    for shift in {0, max((s for s in r if s), key=lambda s: r[s])}:
        place = (shift, max(r[shift], 0.0))
        axes.annotate(
            f"{r[shift]:.2f}", place, (0, 2), textcoords="offset points", ha="center", fontsize=_TEXT
        )
    axes.xaxis.set_major_locator(FixedLocator([shift for shift in r if shift % 2 == 0]))
    axes.set_ylim(min(-0.05, *(1.15 * value for value in r.values())), 1.1)
    return figure


def _axes(x: str, y: str = "", size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    figure = new_figure(*size)
    axes = figure.subplots()
    axes.set_xlabel(x, fontsize=_TEXT)
    axes.set_ylabel(y, fontsize=_TEXT)
    axes.tick_params(labelsize=_TEXT, which="both")
    tidy(axes)
    return figure, axes


def _with_legend(figure: Figure) -> Figure:
    """The legend stands above, where it hides nothing."""
    count = len(figure.axes[0].get_legend_handles_labels()[0])
    if count:
        figure.legend(
            loc="outside upper left",
            ncols=3 if count == 3 else 2,
            frameon=False,
            fontsize=_TEXT,
            handlelength=1.4,
            columnspacing=1.2,
        )
    return figure


def _mark(axes: Axes, x: float, text: str, *, left: bool) -> None:
    """A dashed line over the whole height with its name on top, to one side of it."""
    axes.axvline(x, color=INK, linestyle=":", linewidth=1.0)
    axes.annotate(
        text,
        (x, 1.0),
        (-2 if left else 2, 1),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if left else "left",
        va="bottom",
        fontsize=_TEXT,
    )


def _bars(axes: Axes, values: np.ndarray, reward: np.ndarray, edges: np.ndarray, what: str) -> None:
    """Shares of all values; negative examples stand on top of the others, what lies beyond counts at the ends."""
    inside = np.clip(values, edges[0], edges[-1])
    negative = reward < 0
    others, below = (np.histogram(inside[chosen], edges)[0] / len(inside) for chosen in (~negative, negative))
    axes.stairs(others, edges, fill=True, color=BLUE, label="reward at least 0" if negative.any() else None)
    if negative.any():
        axes.stairs(
            others + below, edges, baseline=others, fill=True, color=ORANGE, label="negative examples"
        )
    axes.set_ylabel(f"share of {what}")
    axes.yaxis.set_major_formatter(_percent)
    axes.set_xlim(edges[0], edges[-1])


def _quantiles(
    axes: Axes, measured: Weights, place: np.ndarray, edges: np.ndarray, middles: np.ndarray
) -> None:
    """Median and bands of the weight, on a logarithmic axis, in bins of ``place``."""
    values = _drawable(measured.weight)
    which = np.clip(np.digitize(place, edges) - 1, 0, len(edges) - 2)
    filled = np.unique(which)
    order = np.argsort(which, kind="stable")
    groups = np.split(values[order], np.searchsorted(which[order], filled[1:]))
    table = np.array([np.percentile(group, (10, 25, 50, 75, 90)) for group in groups]).T
    x = middles[filled]
    axes.plot(x, table[2], color=BLUE, linewidth=1.6, label="median", marker="." if len(x) == 1 else None)
    axes.fill_between(x, table[1], table[3], color=BLUE, alpha=0.3, linewidth=0, label="middle 50%")
    axes.fill_between(x, table[0], table[4], color=BLUE, alpha=0.15, linewidth=0, label="middle 80%")
    axes.set_yscale("log")
    axes.set_ylim(min(table[0].min(), 0.5) * 0.9, max(table[4].max(), 1.0) * 1.25)
    axes.set_ylabel("weight")
    _label_decades(axes, "y")


def _percent(value: float, _: float) -> str:
    return f"{100 * value:g}%"


def _label_decades(axes: Axes, which: str) -> None:
    """Round numbers at the ticks of a logarithmic axis: powers of ten, and within two decades 2 and 5 of each."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _drawable(weight: np.ndarray) -> np.ndarray:
    """Float64; a logarithmic axis has no 0."""
    return np.maximum(weight.astype(np.float64), 1e-30)
