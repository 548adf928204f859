"""Arms that differ in more than the recipe says are found out, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pear_megatron.compare.checks import check_seed, other_data
from pear_megatron.compare.outcome import CellResult
from pear_megatron.compare.recipe import CompareRecipe
from pear_megatron.errors import PearError
from tests.compare import made

ARMS = {
    "SFT": ["pear.variant=none"],
    "token": ["pear.variant=token"],
    "more data": ["pear.variant=token", "+data.train=[a,b]"],
    "no offline phase": None,
}


@pytest.fixture
def seed(tmp_path: Path) -> tuple[CompareRecipe, list[CellResult]]:
    """A seed whose arms saw the same."""
    recipe = made.recipe(tmp_path, arms=ARMS)
    results = list(made.outcome(recipe, {arm: [[0.0, 0.1]] for arm in ARMS}).results)
    made.write_folders(results)
    return recipe, results


def folder(results: list[CellResult], arm: str) -> Path:
    return next(result.cell.folder for result in results if result.arm == arm)


def test_arms_that_saw_the_same_pass(seed: tuple[CompareRecipe, list[CellResult]]) -> None:
    check_seed(*seed)


def test_other_trajectories_are_named_with_arms_file_and_step(
    seed: tuple[CompareRecipe, list[CellResult]],
) -> None:
    made.change_row(folder(seed[1], "token") / "run" / "metrics.jsonl", 3, trajectories="others")
    with pytest.raises(PearError) as caught:
        check_seed(*seed)
    assert str(caught.value).startswith("SFT, seed 0 and token, seed 0 did not see the same trajectories")
    assert "run/metrics.jsonl differ from step 3 on (3 and 3 steps)" in str(caught.value)


def test_a_shorter_run_is_named_too(seed: tuple[CompareRecipe, list[CellResult]]) -> None:
    path = folder(seed[1], "token") / "run" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(PearError, match=r"from step 3 on \(3 and 2 steps\)"):
        check_seed(*seed)


def test_where_the_baseline_has_no_offline_phase_the_others_are_compared_with_each_other(
    seed: tuple[CompareRecipe, list[CellResult]],
) -> None:
    recipe = seed[0].model_copy(update={"baseline": "no offline phase"})
    check_seed(recipe, seed[1])
    made.change_row(folder(seed[1], "token") / "run" / "metrics.jsonl", 1, trajectories="others")
    with pytest.raises(PearError, match="SFT, seed 0 and token, seed 0 did not see the same trajectories"):
        check_seed(recipe, seed[1])


def test_an_arm_with_data_of_its_own_may_see_other_trajectories_but_no_other_problems(
    seed: tuple[CompareRecipe, list[CellResult]],
) -> None:
    run = folder(seed[1], "more data")
    made.change_row(run / "run" / "metrics.jsonl", 1, trajectories="others")
    check_seed(*seed)
    made.change_row(run / "rl" / "metrics.jsonl", 2, problems="others")
    with pytest.raises(PearError) as caught:
        check_seed(*seed)
    assert "SFT, seed 0 and more data, seed 0 did not see the same problems" in str(caught.value)
    assert "rl/metrics.jsonl differ from step 2 on" in str(caught.value)


def test_what_makes_other_data(tmp_path: Path) -> None:
    overrides = {
        "data": ["data.train=x"],
        "added": ["+data.cache_dir=x"],
        "removed": ["~data.tokenizer"],
        "batch": ["train.global_batch_size=8"],
        "longer": ["train.num_epochs=2"],
        "loss": ["pear.gamma=0.9", "optimizer.lr=1e-3", "train.micro_batch_size=4"],
    }
    recipe = made.recipe(tmp_path, arms=overrides, baseline="loss")
    cells = {
        result.arm: result.cell for result in made.outcome(recipe, {a: [[0.0]] for a in overrides}).results
    }
    assert [arm for arm in overrides if not other_data(cells[arm])] == ["loss"]


def test_other_settings_of_rl_are_named_by_key(seed: tuple[CompareRecipe, list[CellResult]]) -> None:
    path = folder(seed[1], "no offline phase") / "rl" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["policy"]["optimizer"]["kwargs"]["lr"] *= 2
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(PearError) as caught:
        check_seed(*seed)
    assert "SFT, seed 0 and no offline phase, seed 0 differ in rl.policy.optimizer.kwargs.lr" in str(
        caught.value
    )


@pytest.mark.parametrize("name", ["before", "after"])
def test_other_settings_of_an_evaluation_are_named_by_key(
    seed: tuple[CompareRecipe, list[CellResult]], name: str
) -> None:
    path = folder(seed[1], "token") / name / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problems": "others"}))
    with pytest.raises(PearError, match=f"differ in {name}.problems"):
        check_seed(*seed)
