"""What verl's settings must be for its loss to be PEAR's, and its token counts; needs no verl to import."""

from __future__ import annotations

from typing import Any

from pear_megatron.errors import RecipeError

ENGINES = ("megatron", "fsdp", "fsdp2")


def check_settings(config: Any, engine_config: Any) -> None:
    """RecipeError where verl's settings break the loss."""
    if engine_config.strategy not in ENGINES:
        raise RecipeError(
            f"engine={engine_config.strategy}: how it scales a loss was not checked; use {', '.join(ENGINES)}"
        )
    if config.data.pad_mode != "no_padding":
        raise RecipeError(f"data.pad_mode={config.data.pad_mode}: the loss reads data.pad_mode=no_padding")
    if getattr(engine_config, "dynamic_context_parallel", False):
        raise RecipeError(
            "engine.dynamic_context_parallel: its scheduler moves samples between ranks, which was not checked for "
            "PEAR's columns; use engine.context_parallel_size"
        )
    if config.model.get("custom_chat_template") and not config.data.pear.get("chat_template"):
        raise RecipeError(
            "model.custom_chat_template: PEAR's dataset reads the template from a file; give it as "
            "+data.pear.chat_template=FILE too"
        )


def check_batches(global_batch_size: int, dp_size: int) -> None:
    """RecipeError where verl would round the batch down."""
    if global_batch_size % dp_size:
        raise RecipeError(
            f"data.train_batch_size={global_batch_size} does not divide among {dp_size} data-parallel ranks; verl "
            "would train on fewer"
        )


def check_vocabulary(engine: Any, hf_config: Any) -> None:
    """RecipeError where a Megatron model has padded columns: verl's log-probs count them as tokens."""
    real = getattr(getattr(hf_config, "text_config", hf_config), "vocab_size", None)
    for chunk in engine.module if isinstance(engine.module, list) else ():
        while hasattr(chunk, "module"):
            chunk = chunk.module
        columns = getattr(chunk, "vocab_size", real)
        if columns != real:
            raise RecipeError(
                f"the model's output layer has {columns} columns for {real} tokens; verl's log-probs have the "
                "padding in their softmax. Choose a tensor-parallel size that divides the vocabulary"
            )


def count_whole_tokens(engine: Any) -> None:
    """Makes the gradient exact where verl's Megatron engine rounds a micro-batch's tokens down to a multiple of CP.

    Under ``calculate_per_token_loss`` (which Megatron-Bridge sets with context parallelism) the engine multiplies the
    loss by a number of tokens and has each rank tell Megatron its share of them to divide by, ``tokens // cp_size``.
    Counting every token cp_size times leaves no remainder. Experts' auxiliary losses and multi-token prediction are
    scaled by the same number, so with those it stays as verl has it.
    """
    config, cp_size = (
        getattr(engine, "tf_config", None),
        getattr(engine.engine_config, "context_parallel_size", 1),
    )
    if cp_size == 1 or config is None or not config.calculate_per_token_loss:
        return
    if config.num_moe_experts or getattr(config, "mtp_num_layers", None):
        return
    original = engine._routed_num_tokens
    engine._routed_num_tokens = lambda data: original(data) * cp_size
