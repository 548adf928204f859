"""What Megatron-LM writes beside the tensors, in our checkpoints too, so that its readers take them for its own."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from pear_megatron.megatron.layout import Layout


def megatron_lm_state(step: int, layout: Layout, *, has_optimizer: bool) -> dict[str, Any]:
    """Keys for a checkpoint's common state, equal on every rank.

    Megatron-Bridge, and NeMo-RL by way of it (``pretrained_checkpoint.format: megatron_lm``), refuses a
    checkpoint without ``args``. A random state in Megatron-LM's form is not there, and ``args`` says so.
    """
    args = Namespace(
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        encoder_tensor_model_parallel_size=0,
        encoder_pipeline_model_parallel_size=0,
        no_save_optim=not has_optimizer,
        no_save_rng=True,
        ckpt_fully_parallel_save=False,
    )
    # 3.0: below 2.0 Megatron-LM would reorder the query, key and value weights.
    return {"args": args, "checkpoint_version": 3.0, "iteration": step}
