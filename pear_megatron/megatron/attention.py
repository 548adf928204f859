"""Which attention a run gets: Transformer Engine's, torch's over packed segments, or Megatron's with a mask."""

from __future__ import annotations

from typing import Any

import torch

from pear_megatron.recipe import ParallelConfig, RecipeError, TrainConfig

INSTALL = "pip install 'pear-megatron[te]'"


def transformer_engine_available() -> bool:
    """Whether mcore's Transformer Engine layers can be used: a GPU and the package."""
    if not torch.cuda.is_available():
        return False
    try:
        from megatron.core.extensions import transformer_engine
    except ImportError:
        return False
    return bool(getattr(transformer_engine, "HAVE_TE", True))


def attention_path(train: TrainConfig) -> str:
    """``transformer_engine``, ``varlen`` or ``mask``: what ``train.attention`` comes to on this machine.

    ``auto`` is Transformer Engine where it imports and packs rows (bfloat16), else ``varlen``.

    Raises:
        RecipeError: Transformer Engine is asked for and there is none, or it is asked for in float32.
    """
    if train.attention == "auto":
        usable = train.precision == "bf16" and transformer_engine_available()
        return "transformer_engine" if usable else "varlen"
    if train.attention == "transformer_engine":
        if train.precision != "bf16":
            raise RecipeError(
                "train.attention=transformer_engine packs rows in bf16 only and train.precision is "
                f"{train.precision}; set train.precision=bf16 or train.attention=varlen"
            )
        if not transformer_engine_available():
            raise RecipeError(
                f"train.attention=transformer_engine needs a GPU and Transformer Engine ({INSTALL}); leave "
                "train.attention at auto, or set varlen"
            )
    return train.attention


def packed_attention(train: TrainConfig) -> str:
    """How packed rows stay apart: ``thd``, by their segments' ends, or ``mask``."""
    return "mask" if attention_path(train) == "mask" else "thd"


def check_attention(parallel: ParallelConfig, train: TrainConfig) -> None:
    """Refuses what only Transformer Engine's layers know.

    Raises:
        RecipeError: names the key and the ways out.
    """
    path = attention_path(train)
    if path == "transformer_engine":
        return
    on_gpu = torch.cuda.is_available()
    cp = parallel.context_parallel_size
    for key, value, used, way_out in (
        ("parallel.context_parallel_size", cp, cp > 1, "set it to 1"),
        ("parallel.tp_comm_overlap", True, parallel.tp_comm_overlap, "leave it out"),
        ("train.fp8", train.fp8, train.fp8 is not None, "leave it and train.fp8_recipe out"),
        # cpu.py lends it to torch's norms; on a GPU nothing does.
        ("parallel.sequence_parallel", True, parallel.sequence_parallel and on_gpu, "leave it out"),
    ):
        if used:
            needs = f"a GPU, Transformer Engine ({INSTALL}) and train.precision=bf16"
            if train.attention != "auto":
                needs = f"{needs.replace(' and', ',')} and train.attention=auto"
            raise RecipeError(
                f"{key} {value} needs {needs}; attention here is {path}: {way_out}, or train there"
            )


def layer_spec(
    train: TrainConfig, *, normalization: str, qk_layernorm: bool, num_experts: int | None = None
) -> Any:
    """mcore's layer spec of a GPT, dense or with experts in every layer, with the attention of ``attention_path``."""
    from megatron.core.models.gpt import gpt_layer_specs as specs

    path = attention_path(train)
    if path == "transformer_engine":
        return specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=num_experts is not None, qk_layernorm=qk_layernorm
        )
    spec = specs.get_gpt_layer_local_spec(
        num_experts=num_experts, qk_layernorm=qk_layernorm, normalization=normalization
    )
    return with_varlen_attention(spec) if path == "varlen" else spec


def with_varlen_attention(spec: Any) -> Any:
    """A local layer spec, changed to have ``VarlenAttention``; or a block's, in all its layers."""
    from pear_megatron.megatron.core_attention import VarlenAttention

    for layer in getattr(spec, "layer_specs", [spec]):
        layer.submodules.self_attention.submodules.core_attention = VarlenAttention
    return spec
