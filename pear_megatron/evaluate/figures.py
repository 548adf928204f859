"""Tables of results on the terminal, and what the problems came to as pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from pear_megatron.evaluate.paired import Comparison
from pear_megatron.evaluate.results import SHARE, Results
from pear_megatron.evaluate.statistics import Estimate, interval
from pear_megatron.pages.figures import BLUE, line_style, literal, new_figure, tidy

NAMES = {"score": "mean score", "response_tokens": "response tokens", "truncated": "share truncated"}
_TEXT = 8


def results_table(results: Results) -> Table:
    """One row per measure."""
    table = Table(title=f"{len(results.problems)} problems, {results.num_samples} responses each")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, e in results.estimates().items():
        table.add_row(NAMES.get(name, name), f"{e.mean:.4g}", f"[{e.low:.4g}, {e.high:.4g}]")
    return table


def comparison_table(names: tuple[str, str], comparison: dict[str, Comparison], runs: int) -> Table:
    """One row per measure: both arms, and their difference."""
    table = Table(title=f"{runs} run(s) each; difference: second - first, paired; 95 % intervals")
    for column in ("", *names, "difference"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, c in comparison.items():
        table.add_row(NAMES.get(name, name), *map(_cell, (c.first, c.second, c.difference)))
    return table


def _cell(e: Estimate) -> str:
    return f"{e.mean:.4g} [{e.low:.4g}, {e.high:.4g}]"


def pass_at_k(arms: dict[str, list[Results]]) -> Figure:
    """pass@k over k, one line per arm with its 95 % band."""
    figure = new_figure(4.3, 3.0)
    axes = figure.subplots()
    for i, (name, runs) in enumerate(arms.items()):
        most = min(results.num_samples for results in runs)
        ks = [k for k in (2**i for i in range(most.bit_length())) if k < most] + [most]
        estimates = [
            interval(np.stack([results.values(f"pass@{k}") for results in runs]), bounds=SHARE) for k in ks
        ]
        style = _style(i, arms)
        axes.plot(ks, [e.mean for e in estimates], marker="o", markersize=3, label=literal(name), **style)
        lows, highs = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(ks, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xlabel("k", fontsize=_TEXT)
    axes.set_ylabel("pass@k, with 95 % interval", fontsize=_TEXT)
    axes.set_ylim(0, None)
    return _finish(figure, axes)


def right_responses(arms: dict[str, list[Results]]) -> Figure:
    """How many problems have 0, 1, ... right responses; over an arm's runs a mean."""
    figure = new_figure(4.3, 3.0)
    axes = figure.subplots()
    most = max(results.num_samples for runs in arms.values() for results in runs)
    width = 0.8 / len(arms)
    for i, (name, runs) in enumerate(arms.items()):
        counts = np.mean(
            [np.bincount([p.right for p in results.problems], minlength=most + 1) for results in runs], axis=0
        )
        places = np.arange(most + 1) + (i - (len(arms) - 1) / 2) * width
        axes.bar(places, counts, width, color=_style(i, arms)["color"], label=literal(name))
    axes.set_xlabel("right responses", fontsize=_TEXT)
    axes.set_ylabel("problems", fontsize=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, axes)


def _style(index: int, arms: dict[str, list[Results]]) -> dict[str, Any]:
    return line_style(index) if len(arms) > 1 else {"color": BLUE}


def _finish(figure: Figure, axes: Axes) -> Figure:
    axes.tick_params(labelsize=_TEXT)
    tidy(axes)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper left", frameon=False, fontsize=_TEXT
        )
    return figure
