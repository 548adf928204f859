"""The inspect page: one HTML file that needs nothing else, and works without JavaScript."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from pear_megatron.inspect import charts
from pear_megatron.inspect.alternatives import Setting
from pear_megatron.inspect.reading import trajectory_html
from pear_megatron.inspect.report import Ratios, Report, shown_statistics
from pear_megatron.inspect.verdicts import Verdict

_SIGNS = {"error": "refused", "warning": "warning", "note": "note", "good": "good"}


def page(report: Report) -> str:
    """The whole page of a report."""
    style = files("pear_megatron.inspect").joinpath("page.css").read_text(encoding="utf-8")
    sections = [_head(report), _verdicts(report.verdicts)]
    if report.ratios is None:
        sections.append(_without_policy(report))
    else:
        sections.append(_settings(report.ratios.alternatives))
        sections.append(_statistics(report.ratios))
        sections.append(_charts(report, report.ratios))
        sections.append(_reading(report, report.ratios))
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>PEAR weights: {escape(report.title)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _head(report: Report) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.facts)
    return f'<header><h1>What PEAR will weigh</h1><dl class="facts-list">{rows}</dl></header>'


def _verdicts(verdicts: list[Verdict]) -> str:
    items = []
    for verdict in verdicts:
        change = f'<p class="change">{escape(verdict.change)}</p>' if verdict.change else ""
        items.append(
            f'<li class="{verdict.level}"><span class="badge">{_SIGNS[verdict.level]}</span>'
            f"<div><strong>{escape(verdict.title)}</strong><p>{escape(verdict.text)}</p>{change}</div></li>"
        )
    return f'<section id="verdicts"><h2>Verdicts</h2><ul>{"".join(items)}</ul></section>'


def _settings(alternatives: list[Setting]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("setting", *Setting.COLUMNS))
    rows = []
    for setting in alternatives:
        given = "" if setting.overrides else ' class="given"'
        name = escape(setting.overrides) or "as given"
        cells = "".join(f"<td>{value}</td>" for value in setting.cells())
        rows.append(f'<tr{given}><th scope="row"><code>{name}</code></th>{cells}</tr>')
    return (
        '<section id="settings"><h2>What other settings would give</h2>'
        "<p>Each row changes the given settings by what it names, on the same trajectories. ESS: effective sample "
        "size, the share of a trajectory's decisions that count. First and last 1/4: the median weight of these "
        "quarters of the responses.</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>'
    )


def _statistics(ratios: Ratios) -> str:
    groups = ratios.weights.by_sign()
    head = "".join(f'<th scope="col">{name}</th>' for name, _ in groups)
    rows = []
    for key, words in shown_statistics():
        cells = "".join(f"<td>{_number(key, statistics[key])}</td>" for _, statistics in groups)
        rows.append(f'<tr><th scope="row">{words} <code>pear/{key}</code></th>{cells}</tr>')
    return (
        '<section id="statistics"><h2>As training will log it, at its first step</h2>'
        f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</section>"
    )


def _number(key: str, value: float) -> str:
    return f"{value:.4f}" if key in ("log_ratio", "weight") else f"{value:.1%}"


def _charts(report: Report, ratios: Ratios) -> str:
    pack, weights, alignment = report.pack, ratios.weights, ratios.alignment
    return _figures(
        charts.log_ratios(pack, weights.config),
        charts.weights(pack, weights),
        charts.position_from_end(pack, weights),
        charts.relative_position(pack, weights),
        charts.effective_sample_sizes(pack, weights),
        charts.lengths(report.sample.num_decisions, report.sample.rewards),
        charts.one_against_the_other(pack, alignment),
        charts.shifts(alignment),
    )


def _without_policy(report: Report) -> str:
    behavior = (charts.behavior(report.pack),) if report.has_behavior else ()
    return _figures(*behavior, charts.lengths(report.sample.num_decisions, report.sample.rewards))


def _figures(*drawn: str) -> str:
    figures = "".join(f"<figure>{svg}</figure>" for svg in drawn)
    return f'<section id="charts"><h2>Distributions</h2><div class="figures">{figures}</div></section>'


def _reading(report: Report, ratios: Ratios) -> str:
    legend = "".join(
        f'<b class="w{level}">{text}</b>'
        for level, text in ((0, " no weight "), (3, " "), (6, " "), (10, " weight 1 "), (12, " more "))
    )
    shown = "".join(
        trajectory_html(
            chosen, report.sample.trajectories[chosen.index], report.pack, ratios.weights, report.tokenizer
        )
        for chosen in ratios.picks
    )
    return (
        '<section id="trajectories"><h2>Trajectories that count most and least</h2>'
        f'<p>Each token is shaded by its weight: <span class="text legend">{legend}</span>. Point at a token for its '
        "log-probs (lp: policy, lb: behaviour), ratio and weight. Prompts are grey and have no weight.</p>"
        f"{shown}</section>"
    )
