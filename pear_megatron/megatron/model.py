"""A Megatron-Core GPT from a recipe, wrapped for training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pear_megatron.megatron import moe
from pear_megatron.megatron.attention import attention_path, layer_spec
from pear_megatron.megatron.fusions import fusions
from pear_megatron.megatron.layout import Layout
from pear_megatron.recipe import ModelConfig, ParallelConfig, TrainConfig
from pear_megatron.recipe.sections import expert_size, padded_vocab_size


def gpt_class() -> type:
    """Megatron-Core's GPTModel, before one is built."""
    from megatron.core.models.gpt import GPTModel

    return GPTModel


def transformer_config(model: ModelConfig, layout: Layout, train: TrainConfig) -> Any:
    """megatron.core's TransformerConfig: no dropout, per-token loss, fusions only with a GPU."""
    from megatron.core.transformer import TransformerConfig

    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    gated = model.activation == "swiglu"
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        init_method_std=model.init_method_std,
        embedding_init_method_std=model.embedding_init_method_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vpp_size if layout.vpp_size > 1 else None,
        context_parallel_size=layout.cp_size,
        sequence_parallel=layout.sequence_parallel,
        tp_comm_overlap=layout.tp_comm_overlap,
        fp8=train.fp8,
        fp8_recipe=train.fp8_recipe or "delayed",  # mcore's default, of no effect without fp8
        recompute_granularity=train.recompute_granularity,
        recompute_method=train.recompute_method,
        recompute_num_layers=train.recompute_num_layers,
        recompute_modules=list(train.recompute_modules or ("core_attn",)),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bf16",
        calculate_per_token_loss=True,
        use_cpu_initialization=layout.device.type != "cuda",
        # Interleaved stages exchange both ways at once; batched, two stages would mix up what they receive.
        overlap_p2p_comm=layout.vpp_size > 1,
        batch_p2p_comm=layout.vpp_size == 1,
        batch_p2p_sync=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        **fusions(model, layout.device),
        **_expert_settings(model, layout, train),
    )
    if model.yarn_rotary_scaling_factor is not None:
        _set_yarn(config, model)
    return config


def _set_yarn(config: Any, model: ModelConfig) -> None:
    """YaRN's settings as GPTModel and its attention look for them: attributes that are no fields of the config."""
    config.yarn_rotary_scaling_factor = model.yarn_rotary_scaling_factor
    config.yarn_original_max_position_embeddings = model.yarn_original_max_position_embeddings
    config.yarn_beta_fast, config.yarn_beta_slow = 32.0, 1.0
    config.yarn_mscale = config.yarn_mscale_all_dim = None  # cosines and sines times 0.1 ln(factor) + 1
    config.yarn_correction_range_round_to_int = True


def _expert_settings(model: ModelConfig, layout: Layout, train: TrainConfig) -> dict[str, Any]:
    """A mixture's: the router in float32, no token dropped, the experts' GEMMs grouped where TE does that."""
    if model.num_moe_experts is None:
        return {}
    moe.check_recompute(train.recompute_method)
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": expert_size(model),
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if train.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": train.moe_aux_loss_coeff,
        "moe_z_loss_coeff": train.moe_z_loss_coeff or None,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": attention_path(train) == "transformer_engine",
        "expert_model_parallel_size": layout.ep_size,
        "expert_tensor_parallel_size": layout.expert_tp_size,
    }


def build_chunks(model: ModelConfig, layout: Layout, train: TrainConfig) -> list[Any]:
    """This rank's part of the GPT as the schedules take it: one model, or one for each virtual stage."""
    if layout.vpp_size == 1:
        return [build_model(model, layout, train)]
    return [build_model(model, layout, train, vp_stage=stage) for stage in range(layout.vpp_size)]


def build_model(
    model: ModelConfig, layout: Layout, train: TrainConfig, *, vp_stage: int | None = None
) -> Any:
    """This rank's part of the GPT, uninitialised, in float32 or bfloat16, on the layout's device.

    Args:
        model, train: sections of the recipe.
        layout: where this rank stands.
        vp_stage: which of the stage's chunks to build, where it has several.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    config = transformer_config(model, layout, train)
    experts = model.num_moe_experts
    spec = layer_spec(
        train, normalization=model.normalization, qk_layernorm=model.qk_layernorm, num_experts=experts
    )
    if experts is not None:
        spec = moe.use_router(spec)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(model.vocab_size, layout.tp_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=layout.is_first_stage and vp_stage in (None, 0),
        post_process=layout.is_last_stage and vp_stage in (None, layout.vpp_size - 1),
        parallel_output=True,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type="yarn" if model.yarn_rotary_scaling_factor else model.position_embedding_type,
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling_factor is not None,
        rope_scaling_factor=model.rope_scaling_factor or 1.0,
        vp_stage=vp_stage,
    ).to(layout.device)
    if experts is not None:
        moe.count_dispatched(gpt)
    return Float16Module(config, gpt) if train.precision == "bf16" else gpt


def wrap_ddp(model: Any, parallel: ParallelConfig, *, grads_in_fp32: bool = True) -> Any:
    """mcore's DistributedDataParallel, whose gradients are summed (not averaged) over the batch.

    Args:
        model: a model, or the list of a stage's chunks.
        parallel: whether the optimizer's state is split and collectives are overlapped.
        grads_in_fp32: gradients are summed in float32; else in the weights' type.

    Returns:
        What was given, wrapped.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    chunks = as_chunks(model)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=grads_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    wrapped = [
        # One bucket for later chunks: their collectives overlap with the other chunks' computation anyway.
        DistributedDataParallel(
            config=chunk.config, ddp_config=ddp_config, module=chunk, disable_bucketing=i > 0
        )
        for i, chunk in enumerate(chunks)
    ]
    config = chunks[0].config  # the schedules read the first chunk's
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync, start = [c.no_sync for c in wrapped], [c.start_grad_sync for c in wrapped]
        config.no_sync_func, config.grad_sync_func = (
            (no_sync, start) if len(wrapped) > 1 else (no_sync[0], start[0])
        )
    return wrapped if isinstance(model, list) else wrapped[0]


def sync_parameters(chunks: list[Any]) -> None:
    """Has every rank hold the parameters of the last step now, where they would come with the next forward pass."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def as_chunks(model: Any) -> list[Any]:
    """The chunks of a model that is one module, or a list of them."""
    return model if isinstance(model, list) else [model]


def unwrap(model: Any) -> Any:
    """The GPTModel inside DDP and precision wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def wraps_precision(model: Any) -> bool:
    """Whether a Float16Module is among the model's wrappers: its forward takes ``fp32_output``."""
    from megatron.core.transformer.module import Float16Module

    while not isinstance(model, Float16Module):
        if not hasattr(model, "module"):
            return False
        model = model.module
    return True
