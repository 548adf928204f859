"""Pictures of a comparison: learning curves, and every seed's take-off and end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from pear_megatron.compare.outcome import WINDOW, Outcome
from pear_megatron.errors import PearError

# Okabe and Ito's colours, told apart by colour-blind readers; line styles say it again.
_COLORS = (
    "#000000",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8A8A8A",
    "#7A4B2A",
    "#B8A500",
)
_LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), ":")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # drawn without pyplot: no display, no global state
    except ImportError as error:
        raise PearError(f"pictures need matplotlib ({error}); pip install 'pear-megatron[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _style(index: int) -> dict[str, Any]:
    return {"color": _COLORS[index % len(_COLORS)], "linestyle": _LINES[index % len(_LINES)]}


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _literal(name: str) -> str:
    """A name as matplotlib shows it letter by letter: $ begins no formula, and _ in front hides no line."""
    text = name.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _smooth(rewards: np.ndarray) -> np.ndarray:
    """The mean of the last WINDOW steps, of as many as there are at the beginning: [..., steps]."""
    summed = np.cumsum(rewards, axis=-1)
    summed[..., WINDOW:] = summed[..., WINDOW:] - summed[..., :-WINDOW]
    return summed / np.minimum(np.arange(1, rewards.shape[-1] + 1), WINDOW)


def learning_curves(outcome: Outcome) -> Any:
    """Reward over RL steps: a thick line an arm (mean over seeds), thin ones for its seeds where they are few."""
    figure = _figure(8.4, 4.6)
    axes = figure.subplots()
    for i, arm in enumerate(outcome.recipe.arms):
        smooth = _smooth(outcome.curves(arm))  # [R, steps]
        steps = np.arange(1, smooth.shape[1] + 1)
        if len(smooth) > 1 and len(outcome.recipe.arms) <= 4:
            for row in smooth:
                axes.plot(steps, row, color=_style(i)["color"], linewidth=0.5, alpha=0.35)
        axes.plot(steps, smooth.mean(axis=0), linewidth=1.8, label=_literal(arm), **_style(i))
    axes.axhline(outcome.recipe.take_off, color="#999999", linewidth=0.6)
    axes.set(xlabel="RL step", ylabel=f"reward (mean of {WINDOW} steps)", ylim=(0, None), xlim=(1, None))
    _tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def every_seed(outcome: Outcome) -> Any:
    """A dot for each seed of each arm: steps to take-off, mean reward, and pass@k after RL."""
    measures = [m for m in outcome.measures if not m.key.startswith("before/")]
    arms = list(outcome.recipe.arms)
    figure = _figure(2.2 + 2.1 * len(measures), 0.9 + 0.32 * len(arms))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for i, arm in enumerate(arms):
            values = measure.values[arm]
            seeds = values.mean(axis=1) if values.ndim == 2 else values
            color = _style(i)["color"]
            axes.plot(seeds, np.full(len(seeds), i), "o", color=color, markersize=4, alpha=0.45, linewidth=0)
            axes.plot(seeds.mean(), i, "|", color=color, markersize=14, markeredgewidth=2)
        axes.set_title(measure.title, fontsize=8)
        axes.set_yticks(range(len(arms)), [_literal(arm) for arm in arms], fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="x", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[0].invert_yaxis()
    return figure


def to_svg(figure: Any) -> str:
    """An <svg> element for a page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "pear-megatron", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def write_png(figure: Any, path: Path) -> None:
    """The picture as a file."""
    figure.savefig(path, dpi=110)
