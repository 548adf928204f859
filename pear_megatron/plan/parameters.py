"""rank_parameters: how many parameters a rank of a pipeline stage holds, as Megatron-Core builds them."""

from __future__ import annotations

import math

from pear_megatron.hf.lora import lora_parameters
from pear_megatron.recipe import LoraConfig, ModelConfig
from pear_megatron.recipe.sections import expert_size, head_size, padded_vocab_size, query_groups


def _norm(model: ModelConfig, width: int) -> int:
    return width if model.normalization == "RMSNorm" else 2 * width


def _mlp(model: ModelConfig, width: int) -> int:
    """Weights of an MLP, of an expert, or of the shared one."""
    return model.hidden_size * width * (3 if model.activation == "swiglu" else 2)


def expert_parameters(model: ModelConfig, ep_size: int = 1, expert_tp_size: int = 1) -> int:
    """Parameters of one layer's routed experts on one rank; 0 in a dense model."""
    return (model.num_moe_experts or 0) // ep_size * _mlp(model, expert_size(model)) // expert_tp_size


def layer_matrices(model: ModelConfig, tp_size: int) -> int:
    """Weights of one transformer layer's matrices on one tensor-parallel rank, without routed experts."""
    h, head = model.hidden_size, head_size(model)
    q, kv = model.num_attention_heads * head, 2 * query_groups(model) * head
    width, router = model.ffn_hidden_size, 0
    if model.num_moe_experts is not None:
        width = model.moe_shared_expert_intermediate_size or 0
        router = h * (model.num_moe_experts + model.moe_shared_expert_gate)  # whole, and so is the gate
    return (h * (q + kv) + q * h + _mlp(model, width)) // tp_size + router


def layer_parameters(model: ModelConfig, tp_size: int) -> int:
    """Parameters of one transformer layer on one tensor-parallel rank, without routed experts."""
    h, head = model.hidden_size, head_size(model)
    split, whole = 0, 2 * _norm(model, h)
    if model.add_qkv_bias or model.add_bias_linear:
        split += (model.num_attention_heads + 2 * query_groups(model)) * head
    if model.add_bias_linear:
        split += model.ffn_hidden_size * (2 if model.activation == "swiglu" else 1)
        whole += 2 * h  # of the two row-parallel projections
    if model.qk_layernorm:
        whole += 2 * _norm(model, head)
    return layer_matrices(model, tp_size) + split // tp_size + whole


def word_embedding_parameters(model: ModelConfig, tp_size: int) -> int:
    """Parameters of the word embedding, or of the output layer, on one tensor-parallel rank."""
    return padded_vocab_size(model.vocab_size, tp_size) // tp_size * model.hidden_size


def rank_parameters(model: ModelConfig, tp_size: int, pp_size: int, stage: int) -> int:
    """Parameters of one rank of pipeline stage ``stage``, counted from 0, without routed experts.

    Padding of the vocabulary is included. With tied embeddings the last stage holds a copy of its own.
    """
    first, last = stage == 0, stage == pp_size - 1
    words = word_embedding_parameters(model, tp_size)
    count = model.num_layers // pp_size * layer_parameters(model, tp_size)
    if first:
        count += words
        if model.position_embedding_type == "learned_absolute":
            count += model.max_position_embeddings * model.hidden_size
    if last:
        count += _norm(model, model.hidden_size)
        if not (first and model.share_embeddings_and_output_weights):
            count += words
    return count


def adapter_parameters(model: ModelConfig, lora: LoraConfig, tp_size: int, pp_size: int) -> int:
    """LoRA's parameters on one rank; every pipeline stage has as many layers."""
    count = 0
    for parameter in lora_parameters(model, lora):
        size = math.prod(parameter.parts[0].shape)
        count += size if parameter.split is None else size // tp_size
    return count // pp_size


def model_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, without padding of the vocabulary: as its name counts them."""
    padding = padded_vocab_size(model.vocab_size, 1) - model.vocab_size
    copies = 1 if model.share_embeddings_and_output_weights else 2
    dense = rank_parameters(model, 1, 1, 0) - copies * padding * model.hidden_size
    return dense + model.num_layers * expert_parameters(model)


def active_parameters(model: ModelConfig) -> int:
    """Parameters that a token meets: of the routed experts those that it goes to."""
    idle = (model.num_moe_experts or 0) - (model.moe_router_topk or 0)
    return model_parameters(model) - model.num_layers * idle * _mlp(model, expert_size(model))
