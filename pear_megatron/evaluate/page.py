"""The pages of eval and eval-compare: one HTML file each, as those of inspect and compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pear_megatron.evaluate import figures
from pear_megatron.evaluate.paired import Comparison
from pear_megatron.evaluate.results import Results
from pear_megatron.evaluate.statistics import Estimate
from pear_megatron.evaluate.verdicts import about_one, about_two
from pear_megatron.pages.figures import to_svg
from pear_megatron.pages.page import Section, render

_SHOWN_CHARACTERS = 1500
_MOVED = 8  # problems


def page_of_one(results: Results, samples: Sequence[dict[str, Any]] = ()) -> str:
    """The page of one evaluation, with a few of the rows of samples.jsonl."""
    name = Path(str(results.settings["model"])).name
    return render(
        "eval.html",
        heading=f"{name} on {len(results.problems):,} problems",
        facts=_facts([results]),
        verdicts=about_one(results),
        words=" over problems",
        columns=["mean"],
        rows=[(figures.NAMES.get(m, m), [_cell(e)]) for m, e in results.estimates().items()],
        charts=_charts({name: [results]}),
        sections=[],
        responses=_some(samples, results.right_at),
    )


def page_of_two(names: tuple[str, str], arms: tuple[list[Results], list[Results]],
                comparison: dict[str, Comparison]) -> str:  # fmt: skip
    """The page of a comparison: the second arm against the first."""
    runs = len(arms[0])
    short = _short(names)
    facts = [("first", names[0]), ("second", names[1]), ("runs", f"{runs} of each")]
    return render(
        "eval.html",
        heading=f"{short[1]} against {short[0]}",
        facts=[*facts, *_facts([*arms[0], *arms[1]])[1:]],
        verdicts=about_two(short, arms, comparison),
        words=f" over {'problems' if runs == 1 else 'runs and problems'}. Differences: second minus first, paired by "
        f"problem{'' if runs == 1 else ' and run'}; an interval in bold does not contain 0",
        columns=[*short, "difference"],
        rows=[
            (figures.NAMES.get(m, m), [_cell(c.first), _cell(c.second), _cell(c.difference, signed=True)])
            for m, c in comparison.items()
        ],
        charts=_charts(dict(zip(short, arms, strict=True))),
        sections=_moved(short, arms),
        responses=[],
    )


def _short(names: tuple[str, str]) -> tuple[str, str]:
    """The last parts of two paths if they differ, else the paths."""
    last = [name.rstrip("/").removesuffix("/results.json").rpartition("/")[2] for name in names]
    return (last[0], last[1]) if last[0] != last[1] else names


def _facts(runs: Sequence[Results]) -> list[tuple[str, str]]:
    s = runs[0].settings
    drawn = " or ".join(map(str, sorted({results.num_samples for results in runs})))
    return [
        ("model", str(s["model"])),
        ("problems", f"{len(runs[0].problems):,}, {drawn} responses to each"),
        ("sampling", ", ".join(
            f"{name} {s[key]:g}"
            for key, name in (("temperature", "temperature"), ("top_p", "top-p"), ("max_new_tokens", "at most"))
            if key in s
        ) + " tokens"),
        ("right", f"a score of at least {runs[0].right_at:g}"),
    ]  # fmt: skip


def _cell(e: Estimate, signed: bool = False) -> tuple[str, str, bool]:
    form = "+.4g" if signed else ".4g"
    return f"{e.mean:{form}}", f"[{e.low:{form}}, {e.high:{form}}]", signed and (e.low > 0 or e.high < 0)


def _charts(arms: dict[str, list[Results]]) -> list[tuple[str, Any]]:
    drawn = (("pass@k over k", figures.pass_at_k), ("Right responses per problem", figures.right_responses))
    return [(title, to_svg(draw(arms), title)) for title, draw in drawn]


def _moved(names: tuple[str, str], arms: tuple[list[Results], list[Results]]) -> list[Section]:
    """The problems whose share of right responses changed most."""
    shares = [np.mean([results.values("pass@1") for results in runs], axis=0) for runs in arms]
    change = shares[1] - shares[0]
    order = [int(i) for i in np.argsort(-np.abs(change), kind="stable")[:_MOVED] if change[i]]
    if not order:
        return []
    ids = [problem.id for problem in arms[0][0].problems]
    rows = [
        (ids[i], [f"{shares[0][i]:.0%}", f"{shares[1][i]:.0%}", f"{100 * change[i]:+.0f} points"])
        for i in order
    ]
    words = [f"Share of right responses, of the {len(order)} problems where it changed most."]
    return [Section("Problems that moved", words, (*names, "change"), rows)]


def _some(samples: Sequence[dict[str, Any]], right_at: float) -> list[dict[str, str]]:
    """The first response that is right, the first that is wrong, and the first that was cut off."""
    kinds = (
        ("right", lambda row: row["score"] >= right_at),
        ("wrong", lambda row: row["score"] < right_at and not row["truncated"]),
        ("cut off", lambda row: row["truncated"] and row["score"] < right_at),
    )
    found = []
    for why, fits in kinds:
        if row := next(filter(fits, samples), None):
            text = row["response"]
            left_out = len(text) - _SHOWN_CHARACTERS
            more = f" … {left_out:,} more characters" if left_out > 0 else ""
            found.append(
                {
                    "why": why,
                    "id": row["id"],
                    "facts": f"score {row['score']:g} · {len(row['tokens']):,} tokens",
                    "text": text[:_SHOWN_CHARACTERS] + more,
                }
            )
    return found
