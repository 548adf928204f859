"""A comparison that cannot be used is refused before anything is prepared or run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("trl", reason="needs the extra rl")
pytest.importorskip("scipy", reason="needs the extra eval")

from pear_megatron import PearConfig
from pear_megatron.cli import app
from pear_megatron.compare.cell import cells_of, fill, tuning_cells
from pear_megatron.compare.recipe import folder_name, load_compare_recipe
from pear_megatron.errors import RecipeError
from tests.compare import tiny
from tests.test_methods import settings_of_methods


def refusal(config: Path, *overrides: str) -> str:
    """What the command says, having written nothing but perhaps an empty output folder."""
    done = CliRunner().invoke(app, ["compare", "--config", str(config), *overrides])
    assert done.exit_code == 1, done.output
    out = config.parent / "out"
    assert [path for path in out.rglob("*") if path.name != ".lock"] == []
    return done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+sedes=[1]", "unknown key 'sedes'; did you mean 'seeds'?"),
        ("+eval.num_sample=8", "did you mean 'num_samples'?"),
        ("+offline.override=[a]", "did you mean 'overrides'?"),
        ("baseline=sft", "baseline 'sft' must be one of at least two arms: SFT, token, no offline phase"),
        ("seeds=[0,1,0]", "seeds [0, 1, 0] has one twice"),
        ("seeds=[]", "seeds"),
        ("seeds=[99,100]", "tune.seed 100 is one of seeds"),
        ("tune.values=[1e-3]", "tune.values"),
        ("+arms.sft=[]", "arm 'sft' would share the folder 'sft' with 'SFT'; rename one"),
        ("eval.k=[1,3]", "eval.k [1, 3]: each is from 1 to eval.num_samples 2"),
        ("eval.k=[]", "eval.k []"),
        ("+eval.temperature=0", "temperature 0 gives one response 2 times; set num_samples to 1"),
        ("take_off=0", "take_off"),
    ],
)
def test_a_bad_key_is_named_with_the_way_out(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tiny.write(tmp_path), override)


def test_arms_need_names_that_make_folders_of_their_own(tmp_path: Path) -> None:
    arms: dict[str, Any] = {"SFT": [], "!!": []}
    assert "arm '!!' would share the folder ''" in refusal(tiny.write(tmp_path, arms=arms))
    assert "at least two arms" in refusal(tiny.write(tmp_path, arms={"SFT": []}))
    assert folder_name("wider clip, (x2)") == "wider-clip-x2"


def test_mistakes_in_the_recipes_that_it_names_are_found_before_anything_is_run(tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        return refusal(tiny.write(tmp_path, **changes))

    base = tiny.values(tmp_path)
    arms = {**base["arms"], "token": ["pear.varaint=token"]}
    said = refused(arms=arms)
    assert "arm token, seed 0" in said
    assert "unknown key 'varaint'; did you mean 'variant'?" in said
    assert "optimizer: unknown key" in refused(tune={"seed": 9, "key": "optimizer.lrr", "values": [1, 2]})
    assert "did you mean 'num_prompts_per_step'" in refused(
        rl={**base["rl"], "overrides": [*base["rl"]["overrides"], "grpo.num_prompt_per_step=2"]}
    )
    assert "has no data.validation" in refused(
        rl={**base["rl"], "overrides": [*base["rl"]["overrides"], "~data.validation"]}
    )
    assert "policy.generation.max_new_tokens" in refused(
        rl={**base["rl"], "overrides": [*base["rl"]["overrides"], "policy.generation.max_new_tokens=null"]}
    )
    said = refused(offline={**base["offline"], "processes": 1})
    assert "arm token, seed 0: offline.processes 1 is no multiple of 2" in said
    assert "nproc" not in said
    assert "no recipe at" in refused(rl={**base["rl"], "recipe": "elsewhere.yaml"})


def test_overrides_that_the_comparison_would_ignore_are_refused(tmp_path: Path) -> None:
    base = tiny.values(tmp_path)
    for changes, said in (
        ({"arms": {**base["arms"], "seedy": ["seed=5"]}}, "arms.seedy: seed=5: the comparison sets it"),
        (
            {"arms": {**base["arms"], "out": ["+output_dir=z"]}},
            "arms.out: +output_dir=z: the comparison sets it",
        ),
        (
            {"rl": {**base["rl"], "overrides": ["grpo.seed=1"]}},
            "rl.overrides: grpo.seed=1: the comparison sets it",
        ),
    ):
        assert said in refusal(tiny.write(tmp_path, **changes))


def test_an_arm_without_an_offline_phase_needs_something_to_start_from(tmp_path: Path) -> None:
    base = tiny.values(tmp_path)
    recipe = {**base["offline"]}
    recipe["overrides"] = [*recipe["overrides"][1:], "checkpoint.pretrained=null"]
    said = refusal(tiny.write(tmp_path, offline=recipe))
    assert "no offline phase" in said
    assert "give model.hf or checkpoint.pretrained" in said


def test_the_recipes_of_the_repository_are_whole() -> None:
    from pear_megatron.compare.checks import check_recipe

    found = sorted((tiny.RECIPES / "compare").glob("*.yaml"))
    assert len(found) > 5
    for path in found:
        if path.stem.endswith("_base"):  # what others inherit
            continue
        recipe = load_compare_recipe(path, ["seeds=[0]"])
        if recipe.tune:  # two values tell whether the key is right
            tune = recipe.tune.model_copy(update={"values": recipe.tune.values[:2]})
            recipe = recipe.model_copy(update={"tune": tune})
        check_recipe(recipe, prepared=False)
        assert recipe.baseline == "SFT"


@pytest.mark.parametrize("name", ["stretches_methods", "puzzles_methods"])
def test_arms_that_are_called_by_a_method_are_that_method(name: str) -> None:
    recipe = load_compare_recipe(tiny.RECIPES / "compare" / f"{name}.yaml", ["seeds=[0]"])
    known = settings_of_methods() | {
        "token": PearConfig(),
        # puzzles.yaml's own
        "centred, wider clip": PearConfig(baseline="sequence_mean", log_ratio_clip=(-0.3, 0.3)),
    }
    assert len(recipe.arms) > 5
    for cell in cells_of(recipe, {}):
        ours = replace(cell, chosen=("model.hf=null",)).offline.pear  # the model is made by prepare
        assert ours.model_copy(update={"block_size": 4}) == known[cell.arm], cell.arm


def test_an_arm_whose_data_lack_a_column_that_it_reads_is_refused(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}
    bare, scored = tmp_path / "bare.jsonl", tmp_path / "scored.jsonl"
    bare.write_text(json.dumps(row) + "\n")
    scored.write_text(json.dumps({**row, "behavior_logprobs": [0, -1.0, -1.0]}) + "\n")
    arms: dict[str, Any] = {
        "SFT": ["pear.variant=none", f"data.train={bare}"],
        "token": ["pear.variant=token", f"data.train=[{scored},{bare}]"],
        "iw-SFT": ["pear.variant=sequence", "pear.ratio=reference", f"data.train={scored}"],
        "KL": ["pear.variant=none", "pear.base_loss=kl", f"data.train={scored}"],
        "no offline phase": None,
    }
    said = refusal(tiny.write(tmp_path, arms=arms, prepare=[], tune=None))
    assert f"{bare}:1: arm token reads behavior_logprobs, which is not there; write them with" in said
    assert f"{scored}:1: arm iw-SFT reads reference_logprobs, which is not there" in said
    assert "`pear-megatron score --as reference`" in said
    assert f"{scored}:1: arm KL reads behavior_topk_ids, which is not there" in said
    assert "arm SFT" not in said
    assert f"{scored}:1: arm token" not in said
    assert "4 problems" in said


def test_a_recipe_is_looked_for_beside_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "mine" / "runs").mkdir(parents=True)
    base = tiny.values(tmp_path)
    offline, rl = ({**base[part], "recipe": f"{part}.yaml"} for part in ("offline", "rl"))
    tiny.write(tmp_path / "mine", offline=offline, rl=rl)
    child = tmp_path / "mine" / "runs" / "child.yaml"
    child.write_text("defaults: ../compare.yaml\nrl: {recipe: own.yaml}\n")
    recipe = load_compare_recipe(child)
    assert recipe.offline.recipe == str(tmp_path / "mine" / "offline.yaml")
    assert recipe.rl.recipe == str(child.parent / "own.yaml")
    overridden = load_compare_recipe(child, ["offline.recipe=../other.yaml"])
    assert overridden.offline.recipe == str(tmp_path / "mine" / "other.yaml")


def test_what_changes_no_number_may_change_in_a_folder_that_is_there(tmp_path: Path) -> None:
    config = tiny.write(tmp_path)
    cells_of(load_compare_recipe(config), {})[1].claim()
    base = tiny.values(tmp_path)
    more = [*base["offline"]["overrides"], "checkpoint.save_interval=1", "checkpoint.keep_last=3"]
    tiny.write(tmp_path, keep="all", offline={**base["offline"], "overrides": more})
    cells_of(load_compare_recipe(config), {})[1].claim()
    with pytest.raises(RecipeError, match=r"other settings: offline.optimizer.lr 0.004 -> 0.5;"):
        cells_of(load_compare_recipe(config), {"token": ("optimizer.lr=0.5",)})[1].claim()


def test_a_cell_is_an_arm_with_its_seed_its_folder_and_what_tuning_chose(tmp_path: Path) -> None:
    recipe = load_compare_recipe(tiny.write(tmp_path, seeds=[3, 4]))
    cells = cells_of(recipe, {"token": ("optimizer.lr=0.004",)})
    assert [(cell.seed, cell.arm) for cell in cells] == [(s, arm) for s in (3, 4) for arm in recipe.arms]
    cell = cells[4]
    assert cell.folder == tmp_path / "out" / "seed4" / "token"
    assert cell.offline.optimizer.lr == 0.004
    assert cell.offline.seed == cell.rl.grpo.seed == 4
    assert cell.offline.checkpoint.pretrained == str(tmp_path / "out" / "prepared" / "seed4" / "base")
    assert cells[3].offline.pear.variant == "none"
    tried = tuning_cells(recipe)
    assert list(tried) == ["SFT", "token"]  # the third arm has no learning rate to choose
    assert [cell.offline.optimizer.lr for cell in tried["token"].values()] == [0.002, 0.004]
    assert {cell.seed for by_value in tried.values() for cell in by_value.values()} == {100}


def test_only_our_own_braces_are_filled_in() -> None:
    texts = ["a={seed}", "b={x: 1}", "c={prepared}/data"]
    assert fill(texts, 3, Path("/p q")) == ["a=3", "b={x: 1}", "c=/p q/data"]
