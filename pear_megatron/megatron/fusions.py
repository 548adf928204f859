"""fusions: which of Megatron-Core's fused kernels a run gets: those that are there, on a GPU."""

from __future__ import annotations

import torch

from pear_megatron.recipe import ModelConfig


def fusions(model: ModelConfig, device: torch.device) -> dict[str, bool]:
    """TransformerConfig's fusions: none on CPU; on a GPU Megatron's own, and what Transformer Engine and Apex bring.

    Args:
        model: YaRN scales cosines and sines, which the fused rotary kernel does not.
        device: where the model is.
    """
    on_gpu = device.type == "cuda"
    rotary = model.position_embedding_type == "rope" and model.yarn_rotary_scaling_factor is None
    return {
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": on_gpu,
        "apply_rope_fusion": on_gpu and rotary and has_fused_rotary(),
        "gradient_accumulation_fusion": on_gpu and has_fused_weight_gradient(),
    }


def has_fused_rotary() -> bool:
    """Whether Transformer Engine's rotary kernels imported, that for packed sequences too."""
    from megatron.core.models.common.embeddings import rope_utils

    kernels = (rope_utils.fused_apply_rotary_pos_emb, rope_utils.fused_apply_rotary_pos_emb_thd)
    return all(kernel is not None for kernel in kernels)


def has_fused_weight_gradient() -> bool:
    """Whether Apex's kernel that adds a weight's gradient to the main gradient imported."""
    from megatron.core.tensor_parallel import layers

    return layers._grad_accum_fusion_available
