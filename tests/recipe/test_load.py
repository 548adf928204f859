"""Recipes: inheritance, overrides, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pear_megatron.recipe import RecipeError, load_recipe, to_yaml
from pear_megatron.storage import differing_keys

RECIPES = Path(__file__).parents[2] / "recipes" / "sft"
TINY = RECIPES / "tiny.yaml"


@pytest.mark.parametrize(
    "path", sorted(set(RECIPES.glob("*.yaml")) - {RECIPES / "base.yaml"}), ids=lambda p: p.stem
)
def test_every_recipe_is_valid_with_data_named_and_as_its_own_baseline(path: Path) -> None:
    for variant in ("token", "none"):
        recipe = load_recipe(path, ["data.train=x.jsonl", f"pear.variant={variant}"])
        assert recipe.pear.variant == variant


def test_recipe_inherits_and_the_child_wins(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"defaults: {TINY}\ntrain: {{max_steps: 5}}\ndata: {{train: [a.jsonl, b.jsonl]}}\n")
    recipe = load_recipe(child)
    assert recipe.train.max_steps == 5
    assert recipe.train.global_batch_size == 8
    assert recipe.pear.log_ratio_clip == (-0.08, 0.3)
    assert recipe.data.train == ["a.jsonl", "b.jsonl"]


def test_overrides_win_and_take_lists(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, ["data.train=x", "pear.log_ratio_clip=[-0.2,0.2]", "optimizer.lr=3e-5"])
    assert recipe.pear.log_ratio_clip == (-0.2, 0.2)
    assert recipe.optimizer.lr == 3e-5


def test_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, ["data.train=x"])
    (tmp_path / "config.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "config.yaml") == recipe


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.train=x", "train.max_step=5"], "train: unknown key 'max_step'; did you mean 'max_steps'?"),
        (["data.train=x", "modle.num_layers=5"], "unknown key 'modle'; did you mean 'model'?"),
        (["data.train=x", "lr=1e-5"], "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (["data.train=x", "optimizer.learning_rate=1e-5"], "unknown key 'learning_rate'; did you mean 'lr'?"),
        (["data.train=x", "train.lr=1e-5"], "train: unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (
            ["data.train=x", "data.batch_size=8"],
            "unknown key 'batch_size'; did you mean 'train.global_batch_size'?",
        ),
        (["data.train=x", "parallel.tp=2"], "unknown key 'tp'; did you mean 'tensor_model_parallel_size'?"),
        (["data.train=x", "max_step=2"], "recipe: unknown key 'max_step'; did you mean 'train.max_steps'?"),
        (["data.train=x", "+lora_rank=2"], "unknown key 'lora_rank'; did you mean 'lora.rank'?"),
        (
            ["data.train=x", "train.seed=2"],
            "train: unknown key 'seed'; did you mean 'seed' outside of this section?",
        ),
        (["data.train=x", "output_dir="], "output_dir: String should have at least 1 character"),
        (["data.train=x", "output_dir='$RUN/a'"], "output_dir $RUN/a has a $ in it"),
        (["data.train=x", "train.max_steps=true"], "train: max_steps is a number, and true is none"),
        (
            ["data.train=x", "pear.log_ratio_clip=0.3"],
            "pear.log_ratio_clip: give a list, as [low,high] (got 0.3)",
        ),
        (
            ["data.train=x", "data.validation=y", "checkpoint.keep_best=validation/nll"],
            "checkpoint.keep_best validation/nll has the last step's evaluation alone to choose from",
        ),
        (["data.train=a,b"], "override data.train=a,b: a list is written in brackets, key=[a,b]"),
        (["train.max_steps=5", "data.train=x=y"], "override data.train=x=y: mismatched input '='"),
        ([], "data.train: this key is required"),
        (["data.train=null"], "tiny.yaml: data.train: Input should be a valid list (got None)"),
        (["data.train='${x}.jsonl'"], "tiny.yaml: data.train: Interpolation key 'x' not found"),
        (
            ["data.train=x", "train.precision=fp8"],
            "train.precision: Input should be 'bf16' or 'fp32' (got 'fp8')",
        ),
        (
            ["data.train=x", "data.seq_length=9999"],
            "data.seq_length 9999 exceeds model.max_position_embeddings 512",
        ),
        (
            ["data.train=x", "model.num_attention_heads=5"],
            "hidden_size 64 is not divisible by num_attention_heads 5",
        ),
        (["data.train=x", "model.num_query_groups=3"], "not divisible by num_query_groups 3"),
        (["data.train=x", "pear.variant=sequence", "pear.normalize=sequence"], "use normalize='none'"),
        (["data.train=x", "not an override"], "override"),
    ],
)
def test_errors_name_the_key_and_the_way_out(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(TINY, overrides)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_parent_and_circles_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at .*nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "a.yaml").write_text("defaults: b.yaml\n")
    with pytest.raises(RecipeError, match=r"no recipe at .*b\.yaml \(named by `defaults` of .*a\.yaml\)"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "d.yaml").write_text("defaults: bb.yaml\n")
    (tmp_path / "bbb.yaml").touch()
    with pytest.raises(RecipeError, match=r"relative to that file's folder; did you mean bbb\.yaml\?"):
        load_recipe(tmp_path / "d.yaml")
    (tmp_path / "mine.yaml").write_text("defaults: base.yaml\n")
    with pytest.raises(RecipeError, match=r"did you mean .*recipes/sft/base\.yaml"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "b.yaml").write_text("defaults: a.yaml\n")
    with pytest.raises(RecipeError, match="circle"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("train: [unclosed\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "c.yaml")


def test_differing_keys_are_dotted() -> None:
    assert differing_keys({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "d": 3}) == ["a.c"]


def test_a_path_at_home_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    child = tmp_path / "child.yaml"
    child.write_text(f"defaults: {TINY}\ndata: {{train: [~/a.jsonl]}}\ncheckpoint: {{pretrained: ~/base}}\n")
    recipe = load_recipe(child, ["output_dir=~/run one"])
    assert recipe.data.train == [f"{tmp_path}/a.jsonl"]
    assert recipe.checkpoint.pretrained == f"{tmp_path}/base"
    assert recipe.output_dir == f"{tmp_path}/run one"
