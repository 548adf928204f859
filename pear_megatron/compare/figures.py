"""Figures of a comparison: learning curves, and every seed's take-off and end."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from pear_megatron.compare.outcome import WINDOW, Outcome
from pear_megatron.pages.figures import AXIS, line_style, literal, new_figure, tidy


def _smooth(rewards: np.ndarray) -> np.ndarray:
    """The mean of the last WINDOW steps, of as many as there are at the beginning: [..., steps]."""
    summed = np.cumsum(rewards, axis=-1)
    summed[..., WINDOW:] = summed[..., WINDOW:] - summed[..., :-WINDOW]
    return summed / np.minimum(np.arange(1, rewards.shape[-1] + 1), WINDOW)


def learning_curves(outcome: Outcome) -> Figure:
    """Reward over RL steps: a thick line per arm (mean over seeds), thin ones for its seeds where they are few."""
    figure = new_figure(8.4, 4.6)
    axes = figure.subplots()
    for i, arm in enumerate(outcome.recipe.arms):
        smooth = _smooth(outcome.curves(arm))  # [R, steps]
        steps = np.arange(1, smooth.shape[1] + 1)
        if len(smooth) > 1 and len(outcome.recipe.arms) <= 4:
            for row in smooth:
                axes.plot(steps, row, color=line_style(i)["color"], linewidth=0.5, alpha=0.35)
        axes.plot(steps, smooth.mean(axis=0), linewidth=1.8, label=literal(arm), **line_style(i))
    axes.axhline(outcome.recipe.take_off, color=AXIS, linewidth=0.6, label="take-off")
    axes.set(xlabel="RL step", ylabel=f"reward (mean of {WINDOW} steps)", ylim=(0, None), xlim=(1, None))
    tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def every_seed(outcome: Outcome) -> Figure:
    """A dot for each seed of each arm: steps to take-off, mean reward, and pass@k after RL."""
    measures = [m for m in outcome.measures if not m.key.startswith("before/")]
    arms = list(outcome.recipe.arms)
    figure = new_figure(2.2 + 2.1 * len(measures), 0.9 + 0.32 * len(arms))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for i, arm in enumerate(arms):
            values = measure.values[arm]
            seeds = values.mean(axis=1) if values.ndim == 2 else values
            color = line_style(i)["color"]
            axes.plot(seeds, np.full(len(seeds), i), "o", color=color, markersize=4, alpha=0.45, linewidth=0)
            axes.plot(seeds.mean(), i, "|", color=color, markersize=14, markeredgewidth=2)
        axes.set_title(measure.title, fontsize=8)
        axes.set_yticks(range(len(arms)), [literal(arm) for arm in arms], fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        tidy(axes, grid="x")
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    return figure
