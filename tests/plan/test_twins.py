"""A scaled-down twin of every recipe trains: its architecture and its layout's kind, on two CPU ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pear_megatron.recipe import Recipe, load_recipe
from tests.distributed import run_ranks
from tests.megatron.ranks import be_quiet
from tests.megatron.runs import metrics, write_trajectories
from tests.plan import recipes

_STEPS = 3


def twin_overrides(name: str) -> list[str]:
    """Small sizes, and what a CPU cannot do switched off: bfloat16 is slow, sequence parallelism needs a GPU."""
    recipe = recipes.load(name)
    stages = 2 if recipe.parallel.pipeline_model_parallel_size > 1 else 1
    groups = recipe.model.num_query_groups
    assert groups is not None
    experts = [
        "model.num_moe_experts=4",
        "model.moe_router_topk=2",
        "model.moe_ffn_hidden_size=32",
        "parallel.expert_model_parallel_size=2",
        "parallel.sequence_parallel=true",
    ]
    return [
        f"model.num_layers={2 * stages}",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        f"model.num_attention_heads={2 * recipe.model.num_attention_heads // groups}",
        "model.num_query_groups=2",
        "model.kv_channels=4",
        "model.vocab_size=1000",
        "model.max_position_embeddings=128",
        "data.seq_length=128",
        f"parallel.pipeline_model_parallel_size={stages}",
        f"parallel.tensor_model_parallel_size={2 // stages}",
        "parallel.sequence_parallel=false",
        "train.precision=fp32",
        "train.global_batch_size=4",
        "train.recompute_num_layers=1",
        f"train.max_steps={_STEPS}",
        *(experts if recipe.model.num_moe_experts is not None else []),
    ]


def _train(_rank: int, runs: list[tuple[Path, list[str]]]) -> int:
    from pear_megatron.megatron import cpu

    cpu.enable()
    be_quiet()
    from megatron.core import parallel_state

    from pear_megatron.megatron.layout import initialize
    from pear_megatron.train.trainer import Trainer

    for path, overrides in runs:
        recipe = load_recipe(path, overrides)
        Trainer(recipe, initialize(recipe.model, recipe.parallel, recipe.train)).train()
        parallel_state.destroy_model_parallel()
    return len(runs)


def test_twin_of_every_recipe_trains(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl", count=20)
    runs = [
        (
            recipes.FOLDER / f"{name}.yaml",
            [f"data.train={data}", f"output_dir={tmp_path}/{name}", *twin_overrides(name)],
        )
        for name in recipes.NAMES
    ]
    run_ranks(2, _train, runs)
    for name in recipes.NAMES:
        rows = metrics(tmp_path / name)
        assert [row["step"] for row in rows] == [1, 2, 3]
        for row in rows:
            assert math.isfinite(row["loss"])
            assert row["grad_norm"] > 0
            assert row["pear/weight"] > 0


@pytest.mark.parametrize("name", recipes.NAMES)
def test_twin_keeps_what_makes_the_model_and_the_training(name: str) -> None:
    whole, twin = recipes.load(name), recipes.load(name, *twin_overrides(name))

    def kind(recipe: Recipe) -> list[object]:
        model, train, parallel = recipe.model, recipe.train, recipe.parallel
        return [
            (model.add_qkv_bias, model.qk_layernorm, model.rope_scaling_factor, model.rotary_base),
            (model.norm_epsilon, model.share_embeddings_and_output_weights, model.normalization),
            (train.recompute_granularity, train.recompute_method, train.micro_batch_size),
            (parallel.use_distributed_optimizer, recipe.optimizer, recipe.pear, recipe.checkpoint),
        ]

    assert kind(twin) == kind(whole)
