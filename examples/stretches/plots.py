"""Pictures of the stretches world: plain functions from numpy arrays to a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from pear_megatron.pages.figures import BAND, BROAD, INK, NARROW, line_style, new_figure, tidy

_MARKERS = ("o", "s", "^", "D", "v", "P")


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def _label(axis: Axis, low: float, high: float) -> None:
    """Round numbers at the ticks of a logarithmic axis: powers of ten, and within two decades 2 and 5 of each."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_plain)


def weights_over_positions(
    weights: Mapping[str, np.ndarray],
    careful: np.ndarray,
    *,
    stretch_length: int,
    names: Sequence[str] | None = None,
    narrow: bool = False,
) -> Figure:
    """Weights of a few trajectories, a panel each, careful stretches shaded.

    Args:
        weights: per arm, [n, T]: the weight of each decision of the same n trajectories.
        careful: bool, [n, stretches].
        stretch_length: decisions in a stretch.
        names: one per trajectory, over its panel.
        narrow: for a telephone.
    """
    count, length = next(iter(weights.values())).shape
    figure = new_figure(NARROW if narrow else BROAD, 1.2 + 1.75 * count)
    panels = figure.subplots(count, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    positions = np.arange(1, length + 1)
    for i, axes in enumerate(panels):
        for s in np.flatnonzero(careful[i]):
            axes.axvspan(s * stretch_length + 0.5, (s + 1) * stretch_length + 0.5, color=BAND, linewidth=0)
        for k, (arm, values) in enumerate(weights.items(), start=1):  # 0 is plain SFT's style
            line = line_style(k) | {"marker": _MARKERS[k % len(_MARKERS)]}
            axes.plot(positions, values[i], markersize=3, linewidth=1.4, label=arm, **line)
        for s in range(careful.shape[1] + 1):
            axes.axvline(s * stretch_length + 0.5, color="#999999", linewidth=0.6)
        axes.set_yscale("log")
        _label(axes.yaxis, min(w.min() for w in weights.values()), max(w.max() for w in weights.values()))
        tidy(axes)
        axes.set_ylabel("weight (log)")
        if names is not None:
            axes.set_title(names[i], fontsize=9, loc="left")
    panels[-1].set_xlabel("decision (token of the answer)")
    panels[-1].set_xlim(0.5, length + 0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        [*handles, Patch(color=BAND)],
        [*labels, "careful stretch"],
        loc="outside upper left",
        ncols=2 if narrow else len(labels) + 1,
        frameon=False,
        fontsize=9,
    )
    return figure


def weight_distributions(
    weights: Mapping[str, np.ndarray],
    *,
    careful: np.ndarray | None = None,
    log_weight_clip: tuple[float, float] = (-10.0, 5.0),
    narrow: bool = False,
) -> Figure:
    """Histogram of the weights of each arm, a panel each, on one logarithmic axis.

    An arm whose weights are all the same (plain SFT) has no panel.

    Args:
        weights: per arm, all weights, of any shape.
        careful: bool, of the same shape: whether the decision is in a careful stretch. These get their own
            histogram, as a dark line: the question is whether they weigh more than the others.
        log_weight_clip: the arms' clip, marked where it falls inside the picture.
        narrow: for a telephone.

    Raises:
        ValueError: no arm has weights that differ.
    """
    drawn = {arm: (k, np.ravel(w)) for k, (arm, w) in enumerate(weights.items(), start=1) if np.ptp(w) > 0.0}
    if not drawn:
        raise ValueError(
            f"every weight of {', '.join(weights)} is the same: there is no distribution to draw"
        )
    figure = new_figure(NARROW if narrow else BROAD, 0.6 + (2.3 if careful is not None else 1.9) * len(drawn))
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    everything = np.log10(np.concatenate([flat for _, flat in drawn.values()]))
    low, high = everything.min() - 0.05, everything.max() + 0.05
    edges = 10.0 ** np.linspace(low, high, 51)
    for axes, (arm, (k, flat)) in zip(panels, drawn.items(), strict=True):
        groups = {"": np.full(flat.shape, True)}
        if careful is not None:
            groups = {"other decisions": ~np.ravel(careful), "in careful stretches": np.ravel(careful)}
        for g, (group, member) in enumerate(groups.items()):
            if not member.any():
                continue
            share = np.full(member.sum(), 1.0 / member.sum())
            line = (
                {"histtype": "step", "color": INK, "linewidth": 1.3}
                if g
                else {"color": line_style(k)["color"], "alpha": 0.8}
            )
            label = f"{group} (mean {flat[member].mean():.2g})" if group else None
            axes.hist(flat[member], bins=edges, weights=share, label=label, **line)
        for bound, name in zip(log_weight_clip, ("floor", "ceiling"), strict=True):
            if low < bound / np.log(10.0) < high:
                axes.axvline(np.exp(bound), color=INK, linestyle=":", label=name)
        axes.legend(
            title=f"{arm}: mean weight {flat.mean():.3g}",
            title_fontsize=9,
            alignment="left",
            frameon=False,
            fontsize=9,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            borderaxespad=0.2,
            ncols=1 if narrow else 4,
        )
        axes.set_ylabel("share")
        tidy(axes)
    panels[-1].set_xscale("log")
    _label(panels[-1].xaxis, 10.0**low, 10.0**high)
    panels[-1].set_xlabel("weight of a decision (log)")
    return figure
