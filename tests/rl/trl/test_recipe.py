"""Recipes for GRPO with TRL: what fits together, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pear_megatron.errors import RecipeError
from pear_megatron.rl.trl.grpo import prompt_order
from pear_megatron.rl.trl.recipe import load_trl_recipe

RECIPES = Path(__file__).parents[3] / "recipes" / "grpo_trl"


@pytest.mark.parametrize(
    "path", [p for p in RECIPES.glob("*.yaml") if p.name != "base.yaml"], ids=lambda p: p.stem
)
def test_every_recipe_loads_and_is_on_policy(path: Path) -> None:
    recipe = load_trl_recipe(path)
    assert recipe.updates_per_step == 1
    assert recipe.data.validation is not None
    asked = [(problems.jsonl, problems.seed) for problems in (recipe.data.train, recipe.data.validation)]
    assert asked[0] != asked[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.num_generation_per_prompt=8", "did you mean 'num_generations_per_prompt'"),
        ("grpo.num_generations_per_prompt=1", "num_generations_per_prompt"),
        ("policy.train_global_batch_size=100", "does not divide the 128 rollouts"),
        ("policy.train_micro_batch_size=3", "does not divide the 128 rollouts of an optimizer step"),
        ("policy.precision=fp32", "precision"),
        ("data.train.seed=-1", "data.train.seed"),
    ],
)
def test_a_recipe_that_cannot_be_used_names_the_key(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_trl_recipe(RECIPES / "puzzles.yaml", [override])


def test_every_epoch_asks_every_problem_once_and_a_longer_run_begins_as_a_shorter_one() -> None:
    order = prompt_order(10, 4, 5, seed=3)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert prompt_order(10, 4, 9, seed=3)[:20] == order
    assert prompt_order(10, 4, 5, seed=4) != order
