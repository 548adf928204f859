"""check_layout: whether a recipe's sizes fit together and fit the processes that were started."""

from __future__ import annotations

from pear_megatron.errors import RecipeError
from pear_megatron.recipe.sections import (
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    expert_size,
    expert_tensor_size,
    head_size,
    query_groups,
)


def check_layout(
    model: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    world_size: int,
    *,
    seq_length: int | None = None,
    ranks: str = "process(es) that torchrun started; change them or --nproc-per-node",
) -> int:
    """The data-parallel size of a run, if Megatron-Core can be started with these sizes.

    Args:
        seq_length: ``data.seq_length``; None = not checked.
        ranks: what there are ``world_size`` of, for messages.

    Raises:
        RecipeError: sizes that do not fit together; names the keys and what to change.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    if world_size % (tp * pp * cp):
        raise RecipeError(
            f"parallel.tensor_model_parallel_size {tp} x parallel.pipeline_model_parallel_size {pp} x "
            f"parallel.context_parallel_size {cp} = {tp * pp * cp} does not divide the {world_size} {ranks}"
        )
    dp = world_size // (tp * pp * cp)
    if train.global_batch_size % (train.micro_batch_size * dp):
        raise RecipeError(
            f"train.global_batch_size {train.global_batch_size} is not divisible by train.micro_batch_size "
            f"{train.micro_batch_size} x {dp} data-parallel rank(s)"
        )
    groups = model.num_query_groups or model.num_attention_heads
    dense = model.num_moe_experts is None
    for key, value, size, size_key in (
        ("model.num_attention_heads", model.num_attention_heads, tp, "tensor_model_parallel_size"),
        ("model.num_query_groups", groups, tp, "tensor_model_parallel_size"),
        ("model.ffn_hidden_size", model.ffn_hidden_size if dense else 0, tp, "tensor_model_parallel_size"),
        ("model.num_layers", model.num_layers, pp, "pipeline_model_parallel_size"),
    ):
        if value % size:
            raise RecipeError(f"{key} {value} is not divisible by parallel.{size_key} {size}")
    _check_experts(model, parallel, world_size)
    if parallel.virtual_pipeline_model_parallel_size is not None:
        _check_interleaving(model, parallel, train, dp)
    if parallel.sequence_parallel and tp == 1:
        raise RecipeError(
            "parallel.sequence_parallel splits over the tensor-parallel ranks and "
            "parallel.tensor_model_parallel_size is 1; leave it out or raise that"
        )
    if seq_length is not None:
        _check_seq_length(seq_length, parallel)
    if train.fp8 is not None:
        _check_fp8(model, parallel, train, seq_length)
    return dp


def _check_experts(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Experts lie over the ranks of a pipeline stage in an order of their own: ETP x EP, and copies of that."""
    ep, pp = parallel.expert_model_parallel_size, parallel.pipeline_model_parallel_size
    if model.num_moe_experts is None:
        if ep > 1 or parallel.expert_tensor_parallel_size is not None:
            key = "expert_model_parallel_size" if ep > 1 else "expert_tensor_parallel_size"
            raise RecipeError(
                f"parallel.{key} {getattr(parallel, key)} splits experts, and model.num_moe_experts is not set; "
                "leave it out"
            )
        return
    etp, tp = expert_tensor_size(parallel), parallel.tensor_model_parallel_size
    if ep == 1 and etp != tp:
        raise RecipeError(
            f"parallel.expert_tensor_parallel_size {etp} other than parallel.tensor_model_parallel_size {tp} needs "
            "parallel.expert_model_parallel_size of 2 or more: Megatron-Core takes the experts of one rank for dense "
            "parameters, and would not add up their gradients; raise that, or leave this out"
        )
    if model.num_moe_experts % ep:
        raise RecipeError(
            f"model.num_moe_experts {model.num_moe_experts} is not divisible by "
            f"parallel.expert_model_parallel_size {ep}"
        )
    if expert_size(model) % etp:
        key = "moe_ffn_hidden_size" if model.moe_ffn_hidden_size else "ffn_hidden_size"
        given = parallel.expert_tensor_parallel_size is not None
        raise RecipeError(
            f"model.{key} {expert_size(model)} is not divisible by parallel.expert_tensor_parallel_size {etp}"
            + ("" if given else " (which is tensor_model_parallel_size's; set it to 1)")
        )
    shared = model.moe_shared_expert_intermediate_size or 0
    if shared % tp:
        raise RecipeError(
            f"model.moe_shared_expert_intermediate_size {shared} is not divisible by "
            f"parallel.tensor_model_parallel_size {tp}"
        )
    if world_size % (etp * ep * pp):
        raise RecipeError(
            f"parallel.expert_tensor_parallel_size {etp} x parallel.expert_model_parallel_size {ep} x "
            f"parallel.pipeline_model_parallel_size {pp} = {etp * ep * pp} does not divide the {world_size} "
            "process(es) that torchrun started; change them or --nproc-per-node"
        )


def _check_interleaving(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, dp: int) -> None:
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    key = "parallel.virtual_pipeline_model_parallel_size"
    assert vpp is not None
    if pp == 1:
        raise RecipeError(f"{key} {vpp} needs parallel.pipeline_model_parallel_size of 2 or more; it is 1")
    if model.num_layers % (pp * vpp):
        raise RecipeError(
            f"model.num_layers {model.num_layers} is not divisible by parallel.pipeline_model_parallel_size "
            f"{pp} x {key} {vpp}"
        )
    micro_batches = train.global_batch_size // (train.micro_batch_size * dp)
    if micro_batches % pp:
        raise RecipeError(
            f"a step has {micro_batches} micro-batch(es) (train.global_batch_size {train.global_batch_size} / "
            f"train.micro_batch_size {train.micro_batch_size} / {dp} data-parallel rank(s)); the interleaved "
            f"schedule of {key} needs a multiple of parallel.pipeline_model_parallel_size {pp}"
        )


def _check_seq_length(seq_length: int, parallel: ParallelConfig) -> None:
    """Zigzag chunks cut every sequence into 2 x CP pieces; sequence parallelism cuts what is left by TP."""
    cp = parallel.context_parallel_size
    tp = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    unit = (2 * cp if cp > 1 else 1) * tp
    if seq_length % unit:
        why = [f"2 x parallel.context_parallel_size {cp}"] if cp > 1 else []
        if parallel.sequence_parallel:
            why.append(f"parallel.tensor_model_parallel_size {tp} (parallel.sequence_parallel)")
        raise RecipeError(
            f"data.seq_length {seq_length} is not divisible by {' x '.join(why)} = {unit}; "
            f"use {-(-seq_length // unit) * unit}"
        )


def _check_fp8(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, seq_length: int | None
) -> None:
    """Sides of the layers' GEMMs on one rank: Transformer Engine takes multiples of 16, for MXFP8 of 32."""
    unit = 32 if train.fp8_recipe == "mxfp8" else 16
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    heads, kv = model.num_attention_heads * head_size(model), 2 * query_groups(model) * head_size(model)
    mlp = {"ffn_hidden_size": model.ffn_hidden_size // tp}
    if model.num_moe_experts is not None:
        mlp = {
            "moe_ffn_hidden_size": expert_size(model) // expert_tensor_size(parallel),
            "moe_shared_expert_intermediate_size": (model.moe_shared_expert_intermediate_size or 0) // tp,
        }
    attention = {"num_attention_heads": heads // tp, "num_query_groups": (heads + kv) // tp}
    for key, side in {"hidden_size": model.hidden_size, **attention, **mlp}.items():
        if side % unit:
            raise RecipeError(
                f"train.fp8_recipe {train.fp8_recipe} multiplies matrices whose sides are multiples of {unit}, and on "
                f"a rank model.{key} makes one of {side}; change tensor parallelism, or leave train.fp8 out"
            )
    ranks = cp * (tp if parallel.sequence_parallel else 1)
    if seq_length is not None and train.micro_batch_size * seq_length // ranks % unit:
        raise RecipeError(
            f"train.fp8_recipe {train.fp8_recipe} multiplies multiples of {unit} tokens, and a rank gets "
            f"{train.micro_batch_size * seq_length // ranks} of a micro-batch; use data.seq_length "
            f"{-(-seq_length // (unit * ranks)) * unit * ranks}"
        )
