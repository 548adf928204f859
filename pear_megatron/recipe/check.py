"""check_layout: whether a recipe's sizes fit together and fit the processes that were started."""

from __future__ import annotations

from pear_megatron.errors import RecipeError
from pear_megatron.recipe.sections import ModelConfig, ParallelConfig, TrainConfig


def check_layout(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, world_size: int) -> int:
    """The data-parallel size of a run.

    Raises:
        RecipeError: sizes that do not fit together; names the keys and what to change.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        raise RecipeError(
            f"parallel.tensor_model_parallel_size {tp} x parallel.pipeline_model_parallel_size {pp} = {tp * pp} "
            f"does not divide the {world_size} process(es) that torchrun started; change them or --nproc-per-node"
        )
    dp = world_size // (tp * pp)
    if train.global_batch_size % (train.micro_batch_size * dp):
        raise RecipeError(
            f"train.global_batch_size {train.global_batch_size} is not divisible by train.micro_batch_size "
            f"{train.micro_batch_size} x {dp} data-parallel rank(s)"
        )
    groups = model.num_query_groups or model.num_attention_heads
    for key, value, size, size_key in (
        ("model.num_attention_heads", model.num_attention_heads, tp, "tensor_model_parallel_size"),
        ("model.num_query_groups", groups, tp, "tensor_model_parallel_size"),
        ("model.ffn_hidden_size", model.ffn_hidden_size, tp, "tensor_model_parallel_size"),
        ("model.num_layers", model.num_layers, pp, "pipeline_model_parallel_size"),
    ):
        if value % size:
            raise RecipeError(f"{key} {value} is not divisible by parallel.{size_key} {size}")
    return dp
