"""Userbuffers: the memory through which Transformer Engine's layers exchange activations while they multiply."""

from __future__ import annotations

from pear_megatron.recipe import Recipe


def start_userbuffers(recipe: Recipe) -> None:
    """What ``parallel.tp_comm_overlap`` needs before the first layer is built; all ranks call it."""
    from transformer_engine.pytorch.module.base import initialize_ub

    tokens = recipe.train.micro_batch_size * recipe.data.seq_length
    initialize_ub(
        shape=[tokens // recipe.parallel.context_parallel_size, recipe.model.hidden_size],
        tp_size=recipe.parallel.tensor_model_parallel_size,
        use_fp8=recipe.train.fp8 is not None,
        bootstrap_backend="nccl",
    )
