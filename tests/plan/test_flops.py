"""The FLOPs formula against torch's own count of a real Megatron-Core model's matrix products."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pear_megatron.plan.flops import flops_per_token, training_flops
from tests.distributed import run_ranks
from tests.plan import recipes, small


def _count(_rank: int, model_keys: dict[str, Any], tokens: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    from pear_megatron.megatron.layout import initialize
    from pear_megatron.megatron.model import build_model

    recipe = small.recipe(model=model_keys, train={"precision": "fp32"})
    layout = initialize(recipe.model, recipe.parallel, recipe.train)
    model = build_model(recipe.model, layout, recipe.train)
    ids = torch.arange(tokens)[None]
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).triu(1)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, position_ids=ids, attention_mask=mask).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "model_keys",
    [
        {},
        {"kv_channels": 32, "qk_layernorm": True},
        {"activation": "gelu", "normalization": "LayerNorm", "num_query_groups": 4},
    ],
    ids=["swiglu-gqa", "wide-heads", "gelu"],
)
def test_formula_is_what_torch_counts(model_keys: dict[str, Any]) -> None:
    tokens = 96
    (counted,) = run_ranks(1, _count, {**model_keys, "vocab_size": 1024}, tokens)
    model = small.recipe(model={**model_keys, "vocab_size": 1024}).model
    products = flops_per_token(model) * tokens
    attention = training_flops(model, [tokens]) - products
    assert counted == products + 2 * attention  # the CPU computes the masked half of the scores too


def test_packed_trajectories_do_not_pay_for_each_other() -> None:
    model = recipes.load("qwen2.5-7b").model
    apart = training_flops(model, [8192, 8192])
    assert training_flops(model, [16384]) > apart
    assert apart == 2 * training_flops(model, [8192])


def test_a_7b_model_takes_about_six_flops_a_parameter_and_token() -> None:
    model = recipes.load("qwen2.5-7b").model
    assert flops_per_token(model) == pytest.approx(6 * 7.07e9, rel=0.01)  # 7.6 B less the embedding
