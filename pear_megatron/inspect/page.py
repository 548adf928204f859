"""The inspect page: one HTML file that needs nothing else, and works without JavaScript."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from pear_megatron.inspect import charts
from pear_megatron.inspect.alternatives import Alternative
from pear_megatron.inspect.reading import read
from pear_megatron.inspect.report import Ratios, Report
from pear_megatron.pages.figures import to_svg
from pear_megatron.pages.page import render

# Training's statistics in the order they are read, and what they are.
_STATISTICS = {
    "log_ratio": "mean log ratio",
    "ratio_clipped_low": "ratios at the low clip",
    "ratio_clipped_high": "ratios at the high clip",
    "weight": "mean weight",
    "weight_at_floor": "weights at the floor",
    "weight_at_ceiling": "weights at the ceiling",
    "effective_sample_size": "effective sample size",
    "negative_stopped": "decisions of negative examples that have stopped",
}


def page(report: Report) -> str:
    """The whole page of a report."""
    return render(
        "inspect.html",
        title=report.title,
        facts=report.facts,
        verdicts=report.verdicts,
        columns=Alternative.COLUMNS,
        charts=[(name, to_svg(figure, name)) for name, figure in _charts(report).items()],
        **_about_ratios(report, report.ratios),
    )


def _about_ratios(report: Report, ratios: Ratios | None) -> dict[str, Any]:
    if ratios is None:
        return {"alternatives": [], "trajectories": []}
    groups = ratios.weights.by_sign()
    return {
        "alternatives": ratios.alternatives,
        "groups": [name for name, _ in groups],
        "statistics": [
            (key, words, [_number(key, statistics[key]) for _, statistics in groups])
            for key, words in _STATISTICS.items()
            if key in ratios.weights.statistics
        ],
        "trajectories": [
            read(pick, report.sample.trajectories[pick.index], report.pack, ratios.weights, report.tokenizer)
            for pick in ratios.picks
        ],
    }


def _number(key: str, value: float) -> str:
    return f"{value:.4f}" if key in ("log_ratio", "weight") else f"{value:.1%}"


def _charts(report: Report) -> dict[str, Figure]:
    pack, sample, ratios = report.pack, report.sample, report.ratios
    lengths = {"Response length": charts.lengths(sample.num_decisions, sample.rewards)}
    if ratios is None:
        return ({"Behaviour log-probs": charts.behavior(pack)} if report.has_behavior else {}) | lengths
    weights, alignment = ratios.weights, ratios.alignment
    agreement = f"Policy and behaviour (correlation {alignment.correlations[0]:.2f})"
    return {
        "Log ratio": charts.log_ratios(pack, weights.config),
        "Weight": charts.weights(pack, weights),
        "Weight and place, from the end": charts.position_from_end(pack, weights),
        "Weight and place, relative": charts.relative_position(pack, weights),
        "Effective sample size": charts.effective_sample_sizes(pack, weights),
        **lengths,
        agreement: charts.one_against_the_other(pack),
        "Are the log-probs at the right tokens?": charts.shifts(alignment),
    }
