"""model.yaml beside the checkpoints of Megatron-LM's loop, so that ``pear-megatron export`` opens them."""

from __future__ import annotations

import argparse
import logging
import re
from dataclasses import fields
from pathlib import Path

import torch.nn.functional as F
from pydantic import ValidationError

from pear_megatron.errors import RecipeError
from pear_megatron.hf.assets import (
    ASSETS,
    MODEL_FILE,
    check_same_model,
    find_root,
    read_model_file,
    write_model_files,
)
from pear_megatron.recipe import ModelConfig
from pear_megatron.recipe.sections import expert_size

log = logging.getLogger("pear_megatron")

# Other arguments that change the model and that ModelConfig has no word for, and their plain values.
_PLAIN = {
    "rotary_percent": 1.0, "rotary_seq_len_interpolation_factor": None, "add_position_embedding": True,
    "hybrid_layer_pattern": None,
}  # fmt: skip
# Fields of TransformerConfig that a ModelConfig describes.
_DESCRIBED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "normalization", "layernorm_epsilon", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "gated_linear_unit",
    "activation_func", "num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_router_pre_softmax",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
)  # fmt: skip
# Of the others, those that say how a model is trained or computed, and not what it computes: parts of their names.
_NOT_THE_MODEL = re.compile(
    "dropout|init_|fus|recompute|offload|saved_activations|stash|fp8|fp4|bf16|fp32|dtype|recipe|graph|inference|flash|"
    "attention_backend|transformer_impl|use_te|kitchen|persist|memory_efficient|mem_eff|pipeline|comm|stream|nccl|"
    "symmetric|dispatch|deepep|hybridep|num_sms|grouped|loss|jitter|logg|log_|bias_update_rate|padding|pad_|chunks|"
    "replay|parameter_transpose|clone_scatter|deterministic|invariant|test_mode|query_key_layer_scaling|tp_only|"
    "shared_expert_overlap|block_specs|checkpoint|_func$"
)
_SAME_NAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "max_position_embeddings",
    "normalization", "position_embedding_type", "rotary_base", "add_bias_linear", "add_qkv_bias", "qk_layernorm",
)  # fmt: skip
_MIXTURE = {
    "num_experts": "num_moe_experts",
    "moe_router_topk": "moe_router_topk",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "moe_router_pre_softmax": "moe_router_pre_softmax",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate": "moe_shared_expert_gate",
}


def model_of(args: argparse.Namespace, vocab_size: int) -> ModelConfig:
    """The model that Megatron-LM's arguments describe, in a recipe's words.

    Raises:
        RecipeError: a recipe has no words for it; names the option, or the field of TransformerConfig.
    """
    for name, plain in _PLAIN.items():
        if getattr(args, name, plain) != plain:
            raise RecipeError(f"--{name.replace('_', '-')} {getattr(args, name)}")
    _require_described(args)
    keys = {name: getattr(args, name) for name in _SAME_NAME}
    if getattr(args, "num_experts", None):
        keys |= {ours: getattr(args, theirs) for theirs, ours in _MIXTURE.items() if hasattr(args, theirs)}
    try:
        return ModelConfig(
            **keys,
            num_query_groups=args.num_query_groups if args.group_query_attention else None,
            norm_epsilon=getattr(args, "layernorm_epsilon", None) or args.norm_epsilon,
            activation="swiglu" if args.swiglu else "gelu",
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            rope_scaling_factor=args.rope_scaling_factor if args.use_rope_scaling else None,
            vocab_size=vocab_size,
        )
    except ValidationError as error:
        raise RecipeError(str(error.errors()[0]["msg"])) from error


def _require_described(args: argparse.Namespace) -> None:
    """Raises RecipeError where TransformerConfig has more to say of the model than a ModelConfig can."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer import TransformerConfig
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    if config.activation_func is not (F.silu if config.gated_linear_unit else F.gelu):
        raise RecipeError("an activation other than --swiglu and GELU")
    plain = TransformerConfig(**{name: getattr(config, name) for name in _DESCRIBED})
    own = {field.name for field in fields(TransformerConfig)} - {f.name for f in fields(ModelParallelConfig)}
    for name in sorted(own - set(_DESCRIBED)):
        value = getattr(config, name)
        if name == "moe_router_load_balancing_type":  # all but this one leave the choice of experts as it is
            differs = value == "sinkhorn"
        else:
            differs = value != getattr(plain, name) and not _NOT_THE_MODEL.search(name)
        if differs:
            raise RecipeError(f"{name} {value}")


def check_loaded_model(args: argparse.Namespace) -> None:
    """Refuses weights of this package's in ``--load`` that belong to another model than the arguments describe.

    Raises:
        RecipeError: names what differs; Megatron-LM reads nothing but tensors, whose shapes may fit.
    """
    try:
        root = find_root(args.load) if args.load else None
    except RecipeError:
        return
    if root is None:
        return
    stored, _ = read_model_file(root)
    try:
        given = model_of(args, stored.vocab_size)
        of_no_effect = {"max_position_embeddings"} if given.position_embedding_type == "rope" else set()
        if given.num_moe_experts and expert_size(given) == expert_size(stored):
            of_no_effect |= {"ffn_hidden_size", "moe_ffn_hidden_size"}
        check_same_model(root, given.model_copy(update={key: getattr(stored, key) for key in of_no_effect}))
    except RecipeError as error:
        raise RecipeError(
            f"--load {args.load}: its {MODEL_FILE} describes another model than this run's options: {error}"
        ) from error


def describe_checkpoints(args: argparse.Namespace, vocab_size: int) -> None:
    """Writes model.yaml, and the tokenizer's files where there are any, into ``--save``; rank 0 calls it.

    Where no recipe has words for the model, it says so and writes nothing: such checkpoints are for the tools of
    the loop that wrote them.
    """
    if args.save is None:
        return
    try:
        model = model_of(args, vocab_size)
    except RecipeError as error:
        log.warning("PEAR: `pear-megatron export` will not know the model in %s (%s)", args.save, error)
        return
    source = _assets_of(args.load)
    if source == Path(args.save).absolute() / ASSETS:
        return  # of the run that goes on here
    precision = "bf16" if args.bf16 else "fp32"
    write_model_files(Path(args.save), model, precision, source=source, tokenizer=args.pear_tokenizer)


def _assets_of(checkpoint: str | None) -> Path | None:
    """The small files beside a checkpoint of ours; None where there are none."""
    if checkpoint is None:
        return None
    try:
        folder = find_root(checkpoint) / ASSETS
    except RecipeError:
        log.info("PEAR: %s has no %s to take a tokenizer from", checkpoint, MODEL_FILE)
        return None
    return folder if folder.is_dir() else None
