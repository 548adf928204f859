"""What saves memory or time is refused, before Megatron-Core is imported, where its parts do not go together."""

from __future__ import annotations

from typing import Any

import pytest

from pear_megatron.recipe import RecipeError, check_layout
from tests.plan import small

BLOCKWISE = {"fp8": "e4m3", "fp8_recipe": "blockwise"}
AWARE = {"use_precision_aware_optimizer": True}
DISTRIBUTED = {"use_distributed_optimizer": True}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"fp8": "e4m3"}}, "fp8 and fp8_recipe go together (they are e4m3 and None)"),
        ({"train": {**BLOCKWISE, "precision": "fp32"}}, "precision is fp32"),
        ({"train": {**BLOCKWISE, "attention": "varlen"}}, "attention varlen; set attention=auto, or leave"),
        (
            {"train": BLOCKWISE, "cluster": {"gpu": "A100-80GB"}},
            "train.fp8_recipe blockwise does not run on cluster.gpu A100-80GB",
        ),
        ({"train": {"fp8": "e4m3", "fp8_recipe": "mxfp8"}}, "mxfp8 does not run on cluster.gpu H100-80GB"),
        ({"parallel": {"tp_comm_overlap": True}}, "tp_comm_overlap needs sequence_parallel"),
        ({"optimizer": AWARE}, "needs parallel.use_distributed_optimizer and train.precision=bf16"),
        ({"optimizer": AWARE, "parallel": DISTRIBUTED, "train": {"precision": "fp32"}}, "train.precision=bf16"),
        ({"optimizer": {"exp_avg_dtype": "bf16"}}, "exp_avg_dtype bf16 needs use_precision_aware_optimizer=true"),
        (
            {"optimizer": {"optimizer_cpu_offload": True}},
            "optimizer_cpu_offload True needs use_precision_aware_optimizer=true",
        ),
        (
            {"optimizer": {"optimizer_offload_fraction": 0.5}},
            "optimizer_offload_fraction 0.5 needs optimizer_cpu_offload=true",
        ),
        (
            {"optimizer": {**AWARE, "optimizer_cpu_offload": True, "exp_avg_sq_dtype": "fp8"}},
            "exp_avg_sq_dtype fp8 needs optimizer_cpu_offload=false (its state is float32)",
        ),
        ({"optimizer": {**AWARE, "optimizer": "muon"}}, "use_precision_aware_optimizer True needs optimizer=adam"),
        ({"optimizer": {"muon_momentum": 0.9}}, "muon_momentum 0.9 needs optimizer=muon"),
        ({"optimizer": {"optimizer": "muon"}, "parallel": DISTRIBUTED}, "set that to false"),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together_are_named_by_their_keys(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        small.recipe(**sections)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("model", "parallel", "train", "said"),
    [
        ({}, {}, {}, None),
        ({}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"micro_batch_size": 2}, None),
        (
            {"ffn_hidden_size": 176},
            {"tensor_model_parallel_size": 2},
            {},
            "sides are multiples of 16, and on a rank model.ffn_hidden_size makes one of 88; change tensor parallelism",
        ),
        ({"kv_channels": 10}, {}, {}, "model.num_attention_heads makes one of 40"),
        (
            {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24},
            {},
            {},
            "model.moe_ffn_hidden_size makes one of 24",
        ),
        ({"hidden_size": 80, "kv_channels": 16}, {}, {"fp8_recipe": "mxfp8"}, "multiples of 32, and on a"),
        (
            {},
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            {"seq_length": 112},
            "multiplies multiples of 16 tokens, and a rank gets 56 of a micro-batch; use data.seq_length 128",
        ),
    ],
)  # fmt: skip
def test_sides_of_fp8_matrices_are_multiples_of_what_transformer_engine_multiplies(
    model: dict[str, Any], parallel: dict[str, Any], train: dict[str, Any], said: str | None
) -> None:
    train = {**BLOCKWISE, **train}
    data = {"train": "unused", "seq_length": train.pop("seq_length", 128)}
    recipe = small.recipe(
        model=model, parallel=parallel, train=train, data=data, cluster={"gpu": "B200-180GB"}
    )
    sections = (recipe.model, recipe.parallel, recipe.train, 2)
    if said is None:
        check_layout(*sections, seq_length=recipe.data.seq_length)
        return
    with pytest.raises(RecipeError) as raised:
        check_layout(*sections, seq_length=recipe.data.seq_length)
    assert said in str(raised.value)
