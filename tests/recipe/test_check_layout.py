"""Sizes that Megatron-Core would refuse, somewhere inside, are refused by their keys before it is imported."""

from __future__ import annotations

from typing import Any

import pytest

from pear_megatron.recipe import ModelConfig, ParallelConfig, RecipeError, TrainConfig, check_layout

MODEL = ModelConfig(
    num_layers=8, hidden_size=64, ffn_hidden_size=128, num_attention_heads=8, num_query_groups=4,
    vocab_size=1000, max_position_embeddings=512,
)  # fmt: skip
TRAIN = TrainConfig(global_batch_size=16, micro_batch_size=2)


def sizes(**keys: Any) -> ParallelConfig:
    names = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline"}
    full = {f"{names[k]}_model_parallel_size": v for k, v in keys.items() if k in names}
    if "cp" in keys:
        full["context_parallel_size"] = keys["cp"]
    if "sp" in keys:
        full["sequence_parallel"] = keys["sp"]
    return ParallelConfig(**full)


@pytest.mark.parametrize(
    ("parallel", "world", "dp"),
    [
        (sizes(), 8, 8),
        (sizes(tp=4, pp=2), 8, 1),
        (sizes(pp=2, vpp=4), 4, 2),
        (sizes(tp=2, cp=2), 8, 2),
        (sizes(tp=2, sp=True, cp=2, pp=2), 8, 1),
    ],
)
def test_what_is_left_of_the_world_is_data_parallel(parallel: ParallelConfig, world: int, dp: int) -> None:
    assert check_layout(MODEL, parallel, TRAIN, world, seq_length=256) == dp


@pytest.mark.parametrize(
    ("parallel", "world", "said"),
    [
        (sizes(tp=2, cp=2), 6, "x parallel.context_parallel_size 2 = 4 does not divide the 6 process"),
        (
            sizes(tp=8),
            8,
            "model.num_query_groups 4 is not divisible by parallel.tensor_model_parallel_size 8",
        ),
        (sizes(pp=3), 3, "model.num_layers 8 is not divisible by parallel.pipeline_model_parallel_size 3"),
        (sizes(), 3, "train.global_batch_size 16 is not divisible by train.micro_batch_size 2 x 3"),
        (sizes(vpp=2), 1, "needs parallel.pipeline_model_parallel_size of 2 or more; it is 1"),
        (
            sizes(pp=2, vpp=3),
            2,
            "model.num_layers 8 is not divisible by parallel.pipeline_model_parallel_size 2 x",
        ),
        (sizes(pp=4, vpp=2), 16, "a step has 2 micro-batch(es)"),
        (sizes(sp=True), 1, "parallel.tensor_model_parallel_size is 1; leave it out or raise that"),
    ],
)
def test_sizes_that_do_not_fit_are_named_by_their_keys(
    parallel: ParallelConfig, world: int, said: str
) -> None:
    with pytest.raises(RecipeError) as raised:
        check_layout(MODEL, parallel, TRAIN, world)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("parallel", "length", "said"),
    [
        (
            sizes(cp=4),
            500,
            "data.seq_length 500 is not divisible by 2 x parallel.context_parallel_size 4 = 8; use 504",
        ),
        (
            sizes(tp=4, sp=True),
            250,
            "parallel.tensor_model_parallel_size 4 (parallel.sequence_parallel) = 4; use 252",
        ),
        (sizes(tp=2, sp=True, cp=2), 252, "= 8; use 256"),
    ],
)
def test_a_row_that_the_ranks_cannot_share_evenly_is_refused(
    parallel: ParallelConfig, length: int, said: str
) -> None:
    with pytest.raises(RecipeError) as raised:
        check_layout(MODEL, parallel, TRAIN, 8, seq_length=length)
    assert said in str(raised.value)


def test_overlapping_the_parameters_needs_what_megatron_asserts() -> None:
    with pytest.raises(ValueError, match="needs use_distributed_optimizer and overlap_grad_reduce"):
        ParallelConfig(overlap_param_gather=True, overlap_grad_reduce=True)
