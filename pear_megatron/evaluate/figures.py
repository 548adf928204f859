"""Tables of results on the terminal, and pass@k over k as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.table import Table

from pear_megatron.evaluate.paired import Comparison
from pear_megatron.evaluate.results import SHARE, Results
from pear_megatron.evaluate.statistics import Estimate, interval
from pear_megatron.pages.figures import line_style, literal, new_figure, tidy, write_png

_NAMES = {"score": "mean score", "response_tokens": "response tokens", "truncated": "share truncated"}


def results_table(results: Results) -> Table:
    """One row per measure."""
    table = Table(title=f"{len(results.problems)} problems, {results.num_samples} responses each")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, e in results.estimates().items():
        table.add_row(_NAMES.get(name, name), f"{e.mean:.4g}", f"[{e.low:.4g}, {e.high:.4g}]")
    return table


def comparison_table(names: tuple[str, str], comparison: dict[str, Comparison], runs: int) -> Table:
    """One row per measure: both arms, and their difference."""
    table = Table(title=f"{runs} run(s) each; difference: second - first, paired; 95 % intervals")
    for column in ("", *names, "difference"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, c in comparison.items():
        table.add_row(_NAMES.get(name, name), *map(_cell, (c.first, c.second, c.difference)))
    return table


def _cell(e: Estimate) -> str:
    return f"{e.mean:.4g} [{e.low:.4g}, {e.high:.4g}]"


def draw_pass_at_k(path: Path, arms: dict[str, list[Results]]) -> None:
    """Draws pass@k over k, one line per arm with its 95 % band."""
    figure = new_figure(5.5, 3.6)
    axes = figure.subplots()
    for i, (name, runs) in enumerate(arms.items()):
        most = min(results.num_samples for results in runs)
        ks = [k for k in (2**i for i in range(most.bit_length())) if k < most] + [most]
        estimates = [
            interval(np.stack([results.values(f"pass@{k}") for results in runs]), bounds=SHARE) for k in ks
        ]
        style = line_style(i)
        axes.plot(ks, [e.mean for e in estimates], marker="o", markersize=3, label=literal(name), **style)
        lows, highs = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(ks, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="k", ylabel="pass@k", ylim=(0, None))
    tidy(axes)
    axes.legend(frameon=False)
    write_png(figure, path)
