"""The comparison's page: one HTML file that needs nothing else, and works without JavaScript."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pear_megatron.compare import figures
from pear_megatron.compare.checks import other_data
from pear_megatron.compare.outcome import WINDOW, Outcome
from pear_megatron.compare.table import make_table
from pear_megatron.compare.verdicts import verdicts
from pear_megatron.pages.figures import in_both_widths
from pear_megatron.pages.page import Section, render


def page(outcome: Outcome, first: Sequence[Section] = (), last: Sequence[Section] = ()) -> str:
    """The whole page; its maker's own sections come ``first``, before the verdicts, and ``last``, after the results."""
    table, tune = make_table(outcome.as_json()), outcome.recipe.tune
    thin = "; thin lines are seeds" if figures.shows_seeds(outcome) else ""
    return render(
        "compare.html",
        facts=_facts(outcome),
        baseline=outcome.recipe.baseline,
        verdicts=verdicts(outcome, table),
        table=table,
        means=[(row.arm, row.means) for row in table.rows],
        differences=[(row.arm, row.differences) for row in table.rows if row.differences is not None],
        curves=in_both_widths(partial(figures.learning_curves, outcome), "Learning curves"),
        curves_words=f" and of {len(outcome.seeds)} seeds{thin}" if len(outcome.seeds) > 1 else "",
        seeds=in_both_widths(partial(figures.every_seed, outcome), "Every seed"),
        window=WINDOW,
        take_off=f"{outcome.recipe.take_off:g}",
        first=first,
        last=last,
        tune=tune,
        tuning=[_tuned(arm, tried) for arm, tried in outcome.tuning.items()] if tune is not None else [],
        arms=[(arm, *_arm(outcome, arm)) for arm in outcome.recipe.arms],
    )


def _facts(outcome: Outcome) -> list[tuple[str, str]]:
    recipe = outcome.recipe
    grpo = outcome.results[0].cell.rl.grpo
    before = outcome.results[0].before
    seeds = _count(complete := len(outcome.seeds))
    if complete < len(recipe.seeds):
        seeds += f", of {len(recipe.seeds)}: the others are not finished"
    return [
        ("arms", f"{len(recipe.arms)} on {seeds}"),
        ("offline phase", recipe.offline.recipe.rpartition("/")[2]),
        (
            "RL",
            f"{recipe.rl.recipe.rpartition('/')[2]}: {grpo.max_num_steps} steps, each of {grpo.num_prompts_per_step} "
            f"problems with {grpo.num_generations_per_prompt} responses",
        ),
        (
            "evaluation",
            f"{len(before.problems) if before else 0} held-out problems, {recipe.eval.num_samples} responses to each",
        ),
        (
            "checked",
            "on each seed all arms saw the same trajectories in the same order (except those with data of their "
            "own) and the same RL problems in the same order, and answered the same held-out problems",
        ),
    ]


def _count(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def _tuned(arm: str, tried: dict[float, float]) -> tuple[str, int, list[float]]:
    """An arm, which of its mean rewards is the best (of equal ones the first), and all of them."""
    rewards = list(tried.values())
    return arm, rewards.index(max(rewards)), rewards


def _arm(outcome: Outcome, arm: str) -> tuple[str, str]:
    """What an arm changes, and a note."""
    overrides = outcome.recipe.arms[arm]
    text = "no offline phase" if overrides is None else " ".join([*overrides, *outcome.chosen.get(arm, ())])
    return text, "other data" if other_data(outcome.of(arm)[0].cell) else ""
