"""Recipes of 7B to 70B: they fit what they say they need, and not half of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pear_megatron.plan import make_plan
from pear_megatron.plan.gpus import GIB
from pear_megatron.recipe import Recipe, RecipeError, load_recipe
from tests.plan import recipes


def _halved(recipe: Recipe) -> list[str]:
    if recipe.cluster.num_nodes > 1:
        return [f"cluster.num_nodes={recipe.cluster.num_nodes // 2}"]
    return [f"cluster.gpus_per_node={recipe.cluster.gpus_per_node // 2}"]


@pytest.mark.parametrize("path", sorted(recipes.FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_in_the_folder_fits_its_cluster(path: Path) -> None:
    if path.stem != "base":
        make_plan(load_recipe(path, missing={"data": {"train": "not given"}})).check()


@pytest.mark.parametrize("name", recipes.NAMES)
def test_recipe_fits_its_nodes_with_room_to_spare(name: str) -> None:
    found = make_plan(recipes.load(name))
    found.check()
    assert found.memory is not None
    assert found.fullest.total < 0.92 * found.memory


@pytest.mark.parametrize("name", recipes.NAMES)
def test_half_the_gpus_are_refused_with_the_reason_and_a_way_out(name: str) -> None:
    halved = _halved(recipes.load(name))
    with pytest.raises(RecipeError) as raised:
        make_plan(recipes.load(name, *halved)).check()
    message = str(raised.value)
    assert "GiB, a GPU has 79.1" in message or "does not divide the 16 GPU(s)" in message
    whole = recipes.load(name).cluster
    for size in ("num_nodes", "gpus_per_node"):
        if f"cluster.{size}=" in halved[0]:
            assert f"cluster.{size}={getattr(whole, size)}" in message


@pytest.mark.parametrize("name", recipes.NAMES)
def test_every_way_out_that_is_named_fits(name: str) -> None:
    halved = _halved(recipes.load(name))
    with pytest.raises(RecipeError) as raised:
        make_plan(recipes.load(name, *halved)).check()
    ways = str(raised.value).split("what fits: ")[1].split("; or ")
    for way in ways:
        make_plan(recipes.load(name, *halved, *way.split(" "))).check()


@pytest.mark.parametrize("name", recipes.NAMES)
def test_recipe_has_the_papers_settings(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.train.num_epochs == 1
    assert recipe.train.precision == "bf16"
    assert recipe.optimizer.lr == 1e-5
    assert (recipe.pear.variant, recipe.pear.gamma) == ("token", 0.999)
    assert recipe.pear.log_ratio_clip == (-0.08, 0.3)
    assert recipe.pear.log_weight_clip == (-10, 5)
    assert recipe.data.seq_length >= 8192
    assert recipe.parallel.use_distributed_optimizer
    assert recipe.parallel.sequence_parallel == (recipe.parallel.tensor_model_parallel_size > 1)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_header_names_the_nodes_the_command_lines_and_the_baseline(name: str) -> None:
    path = recipes.FOLDER / f"{name}.yaml"
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    nodes = recipes.load(name).cluster.num_nodes
    assert f"{nodes} node" in header[0]
    assert any(f"sbatch --nodes={nodes} slurm/sft.sbatch RECIPE" in line for line in header)
    assert any("torchrun" in line for line in header)
    (twin,) = [line for line in header if line.startswith("# Baseline twin: add ")]
    overrides = twin.removeprefix("# Baseline twin: add ").split()
    baseline = load_recipe(path, ["data.train=x.jsonl", *overrides])
    assert baseline.pear.variant == "none"
    assert baseline.output_dir != recipes.load(name).output_dir
    (logic,) = [line for line in header if line.startswith("# Logic games instead of mathematics: add ")]
    assert load_recipe(path, ["data.train=x", logic.split("add ")[1]]).optimizer.lr == 3e-5


def test_nothing_fits_says_so() -> None:
    recipe = recipes.load("llama-3.3-70b", "cluster.num_nodes=1", "cluster.gpus_per_node=1")
    with pytest.raises(RecipeError, match=r"no layout fits on 1 node\(s\) of 1 H100-80GB, recomputed or not"):
        make_plan(recipe)


def test_larger_gpus_fit_more() -> None:
    overrides = ["cluster.gpus_per_node=4", "cluster.gpu=H200-141GB"]
    make_plan(recipes.load("qwen2.5-7b", *overrides)).check()


def test_memory_is_not_checked_on_cpus() -> None:
    found = make_plan(recipes.load("qwen2.5-7b", "cluster.gpu=cpu"))
    found.check()
    assert found.step_seconds is None
    assert found.as_dict()["memory_per_gpu"] is None


def test_time_follows_from_flops_and_the_assumed_utilisation() -> None:
    recipe = recipes.load("qwen2.5-7b")
    slow, fast = make_plan(recipe, mfu=0.2), make_plan(recipe, mfu=0.4)
    assert slow.step_seconds == pytest.approx(2 * (fast.step_seconds or 0))
    assert fast.fullest.total / GIB == pytest.approx(slow.fullest.total / GIB)


def test_documented_recipes_are_these_with_these_figures() -> None:
    text = (recipes.FOLDER.parents[1] / "docs" / "plan.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    documented = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in recipes.NAMES}
    assert sorted(documented) == recipes.NAMES
    for name, (nodes, layout, rows_of_batch, memory) in documented.items():
        found = make_plan(recipes.load(name))
        recipe, parallel = found.recipe, found.recipe.parallel
        sizes = {
            "TP": parallel.tensor_model_parallel_size,
            "PP": parallel.pipeline_model_parallel_size,
            "DP": found.dp_size,
        }
        assert nodes == str(recipe.cluster.num_nodes)
        experts = parallel.expert_model_parallel_size
        expected = " x ".join(f"{key} {size}" for key, size in sizes.items() if size > 1)
        assert layout == expected + (f", EP {experts}" if experts > 1 else "")
        assert rows_of_batch == f"{recipe.train.global_batch_size} x {recipe.data.seq_length}"
        assert memory == f"{found.fullest.total / GIB:.1f}"
