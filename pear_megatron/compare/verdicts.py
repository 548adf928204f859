"""What a comparison's numbers say, and what they do not, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

from pear_megatron.compare.outcome import WINDOW, Outcome
from pear_megatron.compare.table import Table
from pear_megatron.pages.page import Verdict, in_order

_FEW_SEEDS = 4


def verdicts(outcome: Outcome, table: Table) -> list[Verdict]:
    """The findings, the worst first."""
    return in_order([*_take_off(outcome), *_seeds(outcome), *_tuning(outcome), *_differences(outcome, table)])


def _take_off(outcome: Outcome) -> Iterator[Verdict]:
    steps = [step for arm in outcome.recipe.arms for step in outcome.take_offs(arm)]
    length, level = outcome.curves(outcome.recipe.baseline).shape[1], outcome.recipe.take_off
    never = steps.count(None)
    if never == len(steps):
        yield Verdict(
            "warning",
            "RL never took off",
            f"No run's mean reward of {WINDOW} steps reached {level:g} within {length} steps, so the steps to it "
            "say nothing.",
            "Set take_off to a reward that the curves do reach; the same command then draws this page again. Or "
            "give RL more steps or easier problems, in another output_dir.",
        )
    elif never:
        yield Verdict(
            "note",
            "runs that never took off",
            f"{never} of {len(steps)} runs did not reach a reward of {level:g}; they count with RL's {length} "
            "steps, so their arms' means are lower bounds.",
            "Go by the mean reward during RL, which needs no threshold, or give RL more steps, in another "
            "output_dir.",
        )
    elif all(step == WINDOW for step in steps):
        yield Verdict(
            "note",
            "rewarded from the start",
            f"Every run is above a reward of {level:g} at once, so the steps to it tell no arms apart.",
            "Raise take_off; the same command then draws this page again.",
        )


def _seeds(outcome: Outcome) -> Iterator[Verdict]:
    count = len(outcome.seeds)
    if count >= _FEW_SEEDS:
        return
    seen = (
        "One seed shows the path, not the worth of an arm"
        if count == 1
        else f"{count} seeds make wide intervals"
    )
    yield Verdict(
        "warning" if count == 1 else "note",
        "one seed" if count == 1 else "few seeds",
        f"{seen}: RL differs between seeds more than between most arms.",
        "Add seeds to the recipe and give the same command again; finished cells are kept.",
    )


def _tuning(outcome: Outcome) -> Iterator[Verdict]:
    tune = outcome.recipe.tune
    if tune is None:
        return
    ends = (min(tune.values), max(tune.values))
    at_the_edge = [
        f"{arm} ({best:g})"
        for arm, tried in outcome.tuning.items()
        if (best := max(tried, key=lambda value: tried[value])) in ends
    ]
    if at_the_edge:
        yield Verdict(
            "warning",
            "a best value at the edge",
            f"{', '.join(at_the_edge)}: the best {tune.key} is the smallest or the largest that was tried, and a "
            "better one may lie beyond.",
            "Widen tune.values, in another output_dir.",
        )


def _differences(outcome: Outcome, table: Table) -> Iterator[Verdict]:
    others = [row for row in table.rows if row.differences is not None]
    clear = {
        row.arm: [
            f"{title} {entry}"
            for title, entry in zip(table.titles, row.differences or [], strict=True)
            if entry.clear
        ]
        for row in others
    }
    compared, baseline = len(others) * len(table.titles), outcome.recipe.baseline
    found = sum(map(len, clear.values()))
    if found:
        words = "; ".join(f"{arm}: {', '.join(texts)}" for arm, texts in clear.items() if texts)
        yield Verdict(
            "note",
            f"differences from {baseline} whose intervals exclude 0",
            f"{words}. These are {found} of {compared}; of twenty that mean nothing, one is expected to be among "
            "them. With † a difference stays clear when the number of arms is corrected for.",
            "Trust what several measures agree on; repeat the rest with fresh seeds.",
        )
    elif len(outcome.seeds) > 1:
        yield Verdict(
            "note",
            f"no clear difference from {baseline}",
            f"All {compared} intervals contain 0: these seeds do not tell the arms apart.",
            "Four times as many seeds halve an interval. If even its ends would not matter to you, plain SFT is "
            "enough.",
        )
