"""A Megatron-Core GPT from a recipe, wrapped for training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pear_megatron.megatron.layout import Layout
from pear_megatron.recipe import ModelConfig, ParallelConfig, TrainConfig


def transformer_engine_available() -> bool:
    """Whether mcore's Transformer Engine layers can be used: a GPU and the package."""
    if not torch.cuda.is_available():
        return False
    try:
        from megatron.core.extensions import transformer_engine
    except ImportError:
        return False
    return bool(getattr(transformer_engine, "HAVE_TE", True))


def transformer_config(model: ModelConfig, layout: Layout, train: TrainConfig) -> Any:
    """megatron.core's TransformerConfig: no dropout, per-token loss, fusions only with a GPU."""
    from megatron.core.transformer import TransformerConfig

    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    on_gpu = layout.device.type == "cuda"
    gated = model.activation == "swiglu"
    return TransformerConfig(
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
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bf16",
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        batch_p2p_sync=False,
        persist_layer_norm=False,
        bias_activation_fusion=on_gpu,
        masked_softmax_fusion=False,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )


def build_model(model: ModelConfig, layout: Layout, train: TrainConfig) -> Any:
    """This rank's part of the GPT, uninitialised, in float32 or bfloat16, on the layout's device."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer.module import Float16Module

    config = transformer_config(model, layout, train)
    if transformer_engine_available():
        spec = specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_layernorm)
    else:
        spec = specs.get_gpt_layer_local_spec(
            qk_layernorm=model.qk_layernorm, normalization=model.normalization
        )
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=layout.padded_vocab_size(model.vocab_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_base=model.rotary_base,
    ).to(layout.device)
    return Float16Module(config, gpt) if train.precision == "bf16" else gpt


def wrap_ddp(module: Any, parallel: ParallelConfig) -> Any:
    """mcore's DistributedDataParallel with float32 gradients, summed (not averaged) over the batch."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    config = module.config
    config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    return DistributedDataParallel(config=config, ddp_config=ddp_config, module=module)


def unwrap(model: Any) -> Any:
    """The GPTModel inside DDP and precision wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model
