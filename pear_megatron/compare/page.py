"""The comparison's page: one HTML file that needs nothing else, and works without JavaScript."""

from __future__ import annotations

from pear_megatron.compare import figures
from pear_megatron.compare.checks import other_data
from pear_megatron.compare.outcome import Outcome
from pear_megatron.compare.table import make_table
from pear_megatron.pages.figures import to_svg
from pear_megatron.pages.render import render


def page(outcome: Outcome) -> str:
    """The whole page."""
    curves, seeds = figures.learning_curves(outcome), figures.every_seed(outcome)
    table, tune = make_table(outcome.as_json()), outcome.recipe.tune
    return render(
        "compare.html",
        facts=_facts(outcome),
        baseline=outcome.recipe.baseline,
        table=table,
        means=[(row.arm, row.means) for row in table.rows],
        differences=[(row.arm, row.differences) for row in table.rows if row.differences is not None],
        figures={
            name: (to_svg(figure, name), 72 * figure.get_figwidth())
            for name, figure in (("Learning curves", curves), ("Every seed", seeds))
        },
        tune=tune,
        tuning=[_tuned(arm, tried) for arm, tried in outcome.tuning.items()] if tune is not None else [],
        arms=[(arm, *_arm(outcome, arm)) for arm in outcome.recipe.arms],
    )


def _facts(outcome: Outcome) -> list[tuple[str, str]]:
    recipe = outcome.recipe
    grpo = outcome.results[0].cell.rl.grpo
    before = outcome.results[0].before
    complete = len(outcome.seeds)
    return [
        (
            "arms x seeds",
            f"{len(recipe.arms)} x {complete}"
            + ("" if complete == len(recipe.seeds) else f" complete of {len(recipe.seeds)}"),
        ),
        ("offline phase", recipe.offline.recipe.rpartition("/")[2]),
        (
            "RL",
            f"{recipe.rl.recipe.rpartition('/')[2]}: {grpo.max_num_steps} steps of {grpo.num_prompts_per_step} x "
            f"{grpo.num_generations_per_prompt}",
        ),
        (
            "evaluations",
            f"{len(before.problems) if before else 0} held-out problems, {recipe.eval.num_samples} samples each",
        ),
        (
            "checked",
            "in each seed all arms saw the same trajectories in the same order (but for those with data of their own), "
            "the same RL problems in the same order, and were asked the same held-out problems",
        ),
    ]


def _tuned(arm: str, tried: dict[float, float]) -> tuple[str, int, list[float]]:
    """An arm, which of its mean rewards is the best (of equal ones the first), and all of them."""
    rewards = list(tried.values())
    return arm, rewards.index(max(rewards)), rewards


def _arm(outcome: Outcome, arm: str) -> tuple[str, str]:
    """What an arm changes, and a note."""
    overrides = outcome.recipe.arms[arm]
    text = "no offline phase" if overrides is None else " ".join([*overrides, *outcome.chosen.get(arm, ())])
    return text, "other data" if other_data(outcome.of(arm)[0].cell) else ""
