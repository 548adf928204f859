"""The config.json that an exported checkpoint gets: the source's own, or one made from the model's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pear_megatron.errors import RecipeError
from pear_megatron.recipe import ModelConfig
from pear_megatron.recipe.hf_config import LLAMA3_SCALING, Family, family_of, model_keys, read_config
from pear_megatron.recipe.sections import expert_size, head_size, query_groups

_TORCH_NAMES = {"bf16": "bfloat16", "fp32": "float32"}


def config_json(model: ModelConfig, precision: str, assets: Path) -> dict[str, Any]:
    """config.json for a model, readable by transformers 4 and 5.

    Args:
        precision: of the weights, ``bf16`` or ``fp32``.
        assets: the checkpoint's hf/; the config.json there is taken over, with what changed.
    """
    if (assets / "config.json").is_file():
        config = read_config(assets)
        _check_is_of(model, assets)
    else:
        config = _new_config(model) | _special_tokens(assets)
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling_factor is not None:
        rope = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_SCALING}
    elif model.yarn_rotary_scaling_factor is not None:
        rope = {
            "rope_type": "yarn",
            "factor": model.yarn_rotary_scaling_factor,
            "original_max_position_embeddings": model.yarn_original_max_position_embeddings,
        }
    config.pop("dtype", None)
    return config | {
        "torch_dtype": _TORCH_NAMES[precision],  # version 5 reads this name too, the older ones no other
        "rope_parameters": {"rope_theta": float(model.rotary_base), **rope},  # version 5
        "rope_theta": float(model.rotary_base),  # version 4, as the next one
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }


def _check_is_of(model: ModelConfig, assets: Path) -> None:
    found = model_keys(assets)
    expected = model.model_dump() | {"kv_channels": head_size(model), "num_query_groups": query_groups(model)}
    for key, value in found.items():
        if expected[key] != value:
            raise RecipeError(
                f"{assets / 'config.json'} has {key} {value!r}, but the checkpoint's model.yaml {expected[key]!r}; "
                "it is not the config.json of these weights"
            )


def _new_config(model: ModelConfig) -> dict[str, Any]:
    family = family_of(model)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": query_groups(model),
        "head_dim": head_size(model),
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_experts(family, model),
    }


def _experts(family: Family, model: ModelConfig) -> dict[str, Any]:
    """A mixture's keys."""
    if family.experts is None:
        return {}
    common = {
        "num_experts_per_tok": model.moe_router_topk,
        "num_local_experts": model.num_moe_experts,
        "output_router_logits": False,
    }
    if family.experts == "mixtral":
        return common | {"intermediate_size": expert_size(model), "sliding_window": None}
    keys: dict[str, Any] = common | {
        "num_experts": model.num_moe_experts,  # version 4's name, which other readers know alone
        "moe_intermediate_size": expert_size(model),
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if family.shared_expert:
        keys |= {
            "shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
            "qkv_bias": True,
        }
    return keys


def _special_tokens(assets: Path) -> dict[str, int | None]:
    """The ids that generation needs; null where the checkpoint has no tokenizer, lest Llama's defaults apply."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    if not (assets / "tokenizer.json").is_file():
        return dict.fromkeys(keys)
    from pear_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(assets))
    return {key: getattr(tokenizer, key) for key in keys}


def rename_tokenizer_class(path: Path) -> None:
    """Calls transformers 5's general class by the name that version 4 knows too, where a tokenizer has it."""
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def generation_json(config: dict[str, Any]) -> dict[str, Any]:
    """A generation_config.json for a checkpoint that came without: config.json's special tokens."""
    ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True} | {key: value for key, value in ids.items() if value is not None}


def name_end_of_turn(folder: Path) -> None:
    """Adds the chat template's end of turn to ``eos_token_id`` of generation_config.json, where it is not there.

    What serves the folder stops at those (transformers, vLLM, TRL); the tokenizer's EOS may be another token.
    """
    if not (folder / "tokenizer.json").is_file():
        return
    from pear_megatron.data.chat.ends import end_of_turn
    from pear_megatron.data.errors import RowProblem
    from pear_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    try:
        end = end_of_turn(tokenizer)
    except RowProblem:  # a template for other rows than plain questions
        return
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    named = config.get("eos_token_id", tokenizer.eos_token_id)
    ids = [i for i in (named if isinstance(named, list) else [named]) if i is not None]
    if end is not None and end not in ids:
        config["eos_token_id"] = [*ids, end]
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
