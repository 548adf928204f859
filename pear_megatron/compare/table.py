"""The comparison's table, as page, terminal and Markdown show it: means, and differences from the baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pear_megatron.evaluate.statistics import Estimate, holm


@dataclass(frozen=True)
class Entry:
    """One estimate as text.

    Attributes:
        mean: with a sign where it is a difference.
        interval: ``[low, high]``, 95 %; empty where one seed has none.
        clear: whether it is a difference whose interval does not contain 0.
        corrected: whether it is still clear, at 5 %, when the number of arms is corrected for (Holm).
    """

    mean: str
    interval: str
    clear: bool
    corrected: bool = False

    def __str__(self) -> str:
        return f"{self.mean} {self.interval}{' †' if self.corrected else ''}".rstrip()


@dataclass(frozen=True)
class Row:
    """One arm: an entry for each title of the table; ``differences`` is None for the baseline."""

    arm: str
    means: list[Entry]
    differences: list[Entry] | None


@dataclass(frozen=True)
class Table:
    """What a comparison came to."""

    num_seeds: int
    titles: list[str]
    rows: list[Row]


def make_table(results: dict[str, Any]) -> Table:
    """The table of the content of results.json (``Outcome.as_json``)."""
    titles: dict[str, str] = results["measures"]
    one_seed = len(results["seeds"]) == 1

    def entries(estimates: dict[str, dict[str, float]], *, signed: bool) -> list[Entry]:
        # One seed has intervals only where a measure has problems.
        known = {key: "pass@" in key or not one_seed for key in titles}
        return [show(Estimate(**estimates[key]), key, signed=signed, known=known[key]) for key in titles]

    compared = {
        arm: content["p_against_baseline"]
        for arm, content in results["arms"].items()
        if content.get("p_against_baseline")
    }
    adjusted = {
        key: dict(zip(compared, holm([p[key] for p in compared.values()]), strict=True)) for key in titles
    }
    rows = []
    for arm, content in results["arms"].items():
        against = content["against_baseline"]
        differences = entries(against, signed=True) if against is not None else None
        if differences is not None and arm in compared:
            differences = [
                replace(
                    entry,
                    clear=entry.clear and compared[arm][key] < 0.05,  # not where all seeds agree: no width
                    corrected=entry.clear and adjusted[key][arm] < 0.05,
                )
                for key, entry in zip(titles, differences, strict=True)
            ]
        rows.append(Row(arm, entries(content["measures"], signed=False), differences))
    return Table(len(results["seeds"]), list(titles.values()), rows)


def show(estimate: Estimate, key: str, *, signed: bool, known: bool) -> Entry:
    """A measure's estimate as text; ``signed`` is a difference, ``known`` says whether there is an interval."""
    digits = 1 if key == "take_off" else 3
    mean, low, high = (
        f"{value:{'+' if signed else ''}.{digits}f}" for value in (estimate.mean, estimate.low, estimate.high)
    )
    clear = signed and known and (estimate.low > 0 or estimate.high < 0)
    return Entry(mean, f"[{low}, {high}]" if known else "", clear)
