"""Figures of a comparison: learning curves, and every seed's take-off and end."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pear_megatron.compare.outcome import WINDOW, Measure, Outcome
from pear_megatron.pages.figures import AXIS, BROAD, NARROW, line_style, literal, new_figure, tidy

_IN_A_ROW = 4  # panels of a broad figure
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 2.6}
_FEW_ARMS = 4  # whose seeds can be told apart


def _smooth(rewards: np.ndarray) -> np.ndarray:
    """The mean of the last WINDOW steps, of as many as there are at the beginning: [..., steps]."""
    summed = np.cumsum(rewards, axis=-1)
    summed[..., WINDOW:] = summed[..., WINDOW:] - summed[..., :-WINDOW]
    return summed / np.minimum(np.arange(1, rewards.shape[-1] + 1), WINDOW)


def shows_seeds(outcome: Outcome) -> bool:
    """Whether the learning curves have a thin line per seed."""
    return len(outcome.seeds) > 1 and len(outcome.recipe.arms) <= _FEW_ARMS


def learning_curves(outcome: Outcome, narrow: bool = False, width: float = BROAD) -> Figure:
    """Reward over RL steps: a thick line per arm (mean over seeds), thin ones for its seeds where they are few.

    ``narrow`` is for a telephone: as wide as it is, and the legend above instead of beside.
    """
    arms = list(outcome.recipe.arms)
    columns = 2 if max(map(len, arms)) <= 18 else 1  # of the legend above a narrow one
    above = 0.17 * -(-(len(arms) + 1) // columns)
    figure = new_figure(*((NARROW, 3.0 + above) if narrow else (width, 4.2)))
    axes = figure.subplots()
    for i, arm in enumerate(arms):
        smooth = _smooth(outcome.curves(arm))  # [R, steps]
        steps = np.arange(1, smooth.shape[1] + 1)
        if shows_seeds(outcome):
            for row in smooth:
                axes.plot(steps, row, color=line_style(i)["color"], linewidth=0.5, alpha=0.35)
        axes.plot(steps, smooth.mean(axis=0), linewidth=1.8, label=literal(arm), **line_style(i))
    axes.axhline(outcome.recipe.take_off, color=AXIS, linewidth=0.6, label="take-off")
    axes.set(xlabel="RL step", ylabel=f"reward (mean of {WINDOW} steps)", ylim=(0, None), xlim=(1, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    if narrow:
        figure.legend(loc="outside upper left", ncols=columns, **_LEGEND)
    else:
        figure.legend(loc="outside right upper", **_LEGEND)
    return figure


def every_seed(outcome: Outcome, narrow: bool = False) -> Figure:
    """A dot for each seed of each arm: steps to take-off, mean reward, and pass@k after RL.

    ``narrow`` is for a telephone: the panels below each other.
    """
    measures = [m for m in outcome.measures if not m.key.startswith("before/")]
    columns = 1 if narrow else min(_IN_A_ROW, len(measures))
    rows = -(-len(measures) // columns)
    height = rows * (0.7 + 0.3 * len(outcome.recipe.arms))
    figure = new_figure(NARROW if narrow else BROAD, height)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, measure in zip(panels, measures, strict=False):
        _panel(axes, measure, outcome)
    for axes in panels[len(measures) :]:
        axes.set_visible(False)
    return figure


def _panel(axes: Axes, measure: Measure, outcome: Outcome) -> None:
    arms = list(outcome.recipe.arms)
    for i, arm in enumerate(arms):
        values = measure.values[arm]
        seeds = values.mean(axis=1) if values.ndim == 2 else values
        color = line_style(i)["color"]
        axes.plot(seeds, np.full(len(seeds), i), "o", color=color, markersize=4, alpha=0.45, linewidth=0)
        axes.plot(seeds.mean(), i, "|", color=color, markersize=14, markeredgewidth=2)
    axes.set_title(measure.title, fontsize=9)
    names = [textwrap.fill(arm, 20) for arm in arms]
    axes.set_yticks(range(len(arms)), list(map(literal, names)), fontsize=9)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="x", labelsize=8)
    tidy(axes, grid="x")
