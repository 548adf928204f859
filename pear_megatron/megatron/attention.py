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


def check_rows_stay_apart(model: torch.nn.Module, packed: str) -> None:
    """Whether the attention that a model was built with keeps packed trajectories apart as the forward step asks.

    Args:
        model: a chunk of it.
        packed: ``mask`` or ``thd`` (PearForwardStep's ``packed_attention``).

    Raises:
        RecipeError: attention that does not look at the mask (Transformer Engine's, a sliding window, the fused causal
            softmax), local attention, which takes no THD, or Mamba's layers.
    """
    from megatron.core.utils import get_model_config

    config = get_model_config(model)
    if any(type(m).__name__ == "MambaMixer" for m in model.modules()):
        raise RecipeError(
            "the model has Mamba layers, whose state would run on from one packed trajectory into the next; hybrid "
            "models are not supported"
        )
    kinds = {type(m).__name__ for m in model.modules() if "DotProductAttention" in type(m).__name__}
    if packed == "thd":
        if "DotProductAttention" in kinds:
            raise RecipeError(
                "the model has Megatron's local attention, which takes no packed rows (THD): use "
                "packed_attention='mask' (transformer_impl local), or a layer spec with Transformer Engine"
            )
        return
    reason = None
    if any(kind.startswith("TE") for kind in kinds):
        reason = (
            "the model has Transformer Engine's attention: use packed_attention='thd' in bf16 or fp16 "
            "(transformer_impl transformer_engine), or Megatron's local layer spec"
        )
    elif getattr(config, "window_size", None) is not None:
        reason = (
            f"Megatron's local attention puts a mask of its own in its place for window_size {config.window_size}: use "
            "Transformer Engine's layer spec with packed_attention='thd', or no window"
        )
    elif config.masked_softmax_fusion and (config.bf16 or config.fp16):
        reason = (
            "the fused causal softmax takes none: set masked_softmax_fusion false (Megatron-LM: "
            "--no-masked-softmax-fusion)"
        )
    if reason:
        raise RecipeError(f"the mask between packed trajectories would not be looked at; {reason}")


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
