"""Parameters, weights and gradients: what plan says is what Megatron-Core builds, at full size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pear_megatron.plan.memory import stage_memory
from pear_megatron.plan.parameters import layer_parameters, model_parameters, rank_parameters
from pear_megatron.plan.remedies import layout
from pear_megatron.recipe import ModelConfig, load_recipe
from tests.distributed import run_ranks
from tests.plan import recipes
from tests.plan.fake_world import build_every_stage


@pytest.mark.parametrize("name", recipes.NAMES)
def test_every_rank_holds_what_megatron_core_allocates_on_it(name: str) -> None:
    recipe = recipes.load(name)
    planned = stage_memory(recipe, layout(recipe))
    (built,) = run_ranks(1, build_every_stage, name)
    assert [rank.stage for rank in built] == [stage.stage for stage in planned]
    for rank, stage in zip(built, planned, strict=True):
        assert stage.parameters == rank.parameters
        assert stage.weights == rank.weights
        assert stage.gradients == rank.gradients
        assert rank.padding < 1e-4 * rank.parameters


@pytest.mark.parametrize("name", recipes.NAMES)
def test_recipe_is_the_published_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(recipes.HF_CONFIGS[name]))
    recipe = recipes.load(name, f"model.hf={tmp_path}")  # refused where a key disagrees
    assert recipe.model.model_dump(exclude={"hf"}) == recipes.load(name).model.model_dump(exclude={"hf"})


@pytest.mark.parametrize("name", recipes.NAMES)
def test_model_has_as_many_parameters_as_transformers_gives_it(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(recipes.HF_CONFIGS[name]))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model_parameters(recipes.load(name).model) == sum(p.numel() for p in model.parameters())


def test_tied_embeddings_biases_and_positions_are_counted() -> None:
    model = ModelConfig.model_validate(
        {
            "num_layers": 2,
            "hidden_size": 8,
            "ffn_hidden_size": 32,
            "num_attention_heads": 2,
            "vocab_size": 128,
            "max_position_embeddings": 16,
            "normalization": "LayerNorm",
            "activation": "gelu",
            "position_embedding_type": "learned_absolute",
            "add_bias_linear": True,
            "share_embeddings_and_output_weights": True,
        }
    )
    layer = (3 * 8 * 8 + 3 * 8) + (8 * 8 + 8) + (32 * 8 + 32) + (8 * 32 + 8) + 2 * 16
    assert layer_parameters(model, 1) == layer
    assert rank_parameters(model, 1, 1, 0) == 2 * layer + 128 * 8 + 16 * 8 + 16
    # Over two stages the last one holds a copy of the embedding.
    assert rank_parameters(model, 1, 2, 0) == layer + 128 * 8 + 16 * 8
    assert rank_parameters(model, 1, 2, 1) == layer + 16 + 128 * 8


def test_plan_needs_no_data_and_no_weights() -> None:
    # As the command does.
    recipe = load_recipe(recipes.FOLDER / "qwen2.5-7b.yaml", missing={"data": {"train": "not given"}})
    assert recipe.model.hf is None
