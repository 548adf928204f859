"""recipes/grpo: every one composes over NeMo-RL's bases, fits its cluster, and says in its header what it is."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from pear_megatron.rl.nemo_rl.config import Composed, compose
from pear_megatron.rl.nemo_rl.rules import data_sets, ignored_faults, layout, size_faults

FOLDER = Path(__file__).parents[3] / "recipes" / "grpo"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
LAYOUTS = {  # nodes, TP, PP, DP, TP of vLLM
    "qwen2.5-7b": (4, 2, 1, 16, 4),
    "qwen3-8b": (1, 1, 2, 4, 1),
    "deepseek-r1-distill-qwen-7b": (4, 2, 1, 16, 4),
    "qwen3-14b": (2, 4, 1, 4, 2),
    "qwen3-30b-a3b": (8, 2, 1, 32, 4),
    "qwen2.5-32b": (4, 4, 4, 2, 4),
    "qwen2.5-72b": (8, 4, 4, 4, 8),
    "llama-3.3-70b": (8, 4, 4, 4, 8),
}


@cache
def composed(nemo_rl: Path, name: str) -> Composed:
    return compose(nemo_rl, FOLDER / name, [])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_composes_and_its_sizes_fit(nemo_rl: Path, name: str) -> None:
    recipe = composed(nemo_rl, name)
    assert ignored_faults(recipe) + size_faults(recipe, layout(recipe)) == []


@pytest.mark.parametrize(("name", "expected"), LAYOUTS.items())
def test_layout_is_the_one_meant_and_the_one_in_the_header(
    nemo_rl: Path, name: str, expected: tuple[int, ...]
) -> None:
    sizes = layout(composed(nemo_rl, f"{name}.yaml"))
    nodes, tensor, pipeline, data, _ = expected
    assert (sizes.num_nodes, sizes.tensor, sizes.pipeline, sizes.data_parallel, sizes.vllm_tensor) == expected
    assert sizes.gpus_per_node == 8
    assert nodes * 8 == tensor * pipeline * data
    header = re.search(
        r"on (\d+) nodes? of 8 GPUs: TP (\d+) x PP (\d+) x DP (\d+)(, sequence parallel)?",
        (FOLDER / f"{name}.yaml").read_text(),
    )
    assert header is not None
    assert tuple(int(x) for x in header.groups()[:4]) == (nodes, tensor, pipeline, data)
    assert sizes.sequence_parallel == bool(header[5])


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rate_is_where_the_megatron_backend_reads_it(nemo_rl: Path, name: str) -> None:
    recipe = composed(nemo_rl, name)
    assert recipe.get("policy.optimizer") is None
    assert 1e-8 <= recipe.get("policy.megatron_cfg.optimizer.lr") <= 1e-5
    assert recipe.get("policy.megatron_cfg.optimizer.min_lr") <= recipe.get(
        "policy.megatron_cfg.optimizer.lr"
    )


@pytest.mark.parametrize("name", RECIPES)
def test_validation_reports_pass_at_1_and_8_of_checkpoints_that_are_kept(nemo_rl: Path, name: str) -> None:
    recipe = composed(nemo_rl, name)
    assert recipe.get("grpo.val_num_generations_per_prompt") == 8
    assert recipe.get("policy.generation.temperature") > 0
    assert recipe.get("grpo.val_at_start")
    assert recipe.get("checkpointing.enabled")
    assert recipe.get("checkpointing.save_period") % recipe.get("grpo.val_period") == 0
    assert [entry for where, entry in data_sets(recipe) if where.startswith("data.validation")]


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_recipe_has_a_twin_in_recipes_sft_and_folders_of_its_own(nemo_rl: Path, name: str) -> None:
    recipe = composed(nemo_rl, f"{name}.yaml")
    assert (FOLDER.parent / "sft" / f"{name}.yaml").is_file()
    assert recipe.get("policy.model_name") == f"results/sft/{name}/export"
    assert recipe.get("checkpointing.checkpoint_dir") == f"results/grpo/{name}"
    assert recipe.get("logger.log_dir") == f"results/grpo/{name}/logs"


def test_a_recipe_starts_from_the_megatron_checkpoint_of_a_run(nemo_rl: Path) -> None:
    recipe = composed(nemo_rl, "qwen2.5-7b_from_megatron.yaml")
    assert recipe.get("checkpointing.pretrained_checkpoint") == {
        "path": "results/sft/qwen2.5-7b/checkpoints",
        "format": "megatron_lm",
    }
