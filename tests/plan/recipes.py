"""The recipes of 7B to 70B, and config.json of the checkpoints they are for, as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pear_megatron.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "sft"

_QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def _sizes(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


HF_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {**_QWEN25, **_sizes(28, 3584, 18944, 28, 4)},
    "deepseek-r1-distill-qwen-7b": {**_QWEN25, **_sizes(28, 3584, 18944, 28, 4), "rope_theta": 10000},
    "qwen3-8b": {**_QWEN3, **_sizes(36, 4096, 12288, 32, 8)},
    "qwen3-14b": {**_QWEN3, **_sizes(40, 5120, 17408, 40, 8)},
    "qwen3-30b-a3b": {
        **_QWEN3,
        **_sizes(48, 2048, 6144, 32, 4),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.001,
    },
    "qwen2.5-32b": {**_QWEN25, **_sizes(64, 5120, 27648, 40, 8), "rms_norm_eps": 1e-05},
    "qwen2.5-72b": {**_QWEN25, **_sizes(80, 8192, 29568, 64, 8), "rms_norm_eps": 1e-05},
    "llama-3.3-70b": {
        **_sizes(80, 8192, 28672, 64, 8),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
}
NAMES = sorted(HF_CONFIGS)


def load(name: str, *overrides: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml", ["data.train=x.jsonl", *overrides])
