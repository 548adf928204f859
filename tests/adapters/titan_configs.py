"""A config of torchtitan's, as its users write one: ``--module tests.adapters.titan_configs --config tiny_llama``."""

from __future__ import annotations

import os
from pathlib import Path

from torchtitan.components.optimizer import default_adamw
from torchtitan.models.common.rope import ComplexRoPE
from torchtitan.models.llama3 import model_registry
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from pear_megatron import PearConfig
from pear_megatron.adapters.torchtitan import with_pear
from pear_megatron.data import DataConfig


def tiny_llama() -> Trainer.Config:
    """Four layers that begin from model/, trained for three steps of four rows of data.jsonl, in float32."""
    folder = Path(os.environ["PEAR_TEST_FOLDER"])
    config = llama3_debugmodel()
    config.model_spec = model_registry("debugmodel", attn_backend="flex")
    config.model_spec.model.layers = config.model_spec.model.layers[:4]
    for _, rope, _, _ in config.model_spec.model.traverse(ComplexRoPE.Config):
        rope.scaling = "none"
    config.hf_assets_path = str(folder / "model")
    config.optimizer = default_adamw(lr=1e-3, weight_decay=0.0)
    config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio = 0, 0.0
    config.training.steps, config.training.local_batch_size, config.training.global_batch_size = 3, 2, 4
    config.training.mixed_precision_param = "float32"
    config.metrics.log_freq, config.metrics.enable_tensorboard = 1, True
    config.checkpoint.enable, config.checkpoint.initial_load_in_hf = True, True
    config.checkpoint.initial_load_path = str(folder / "model")
    config.validator.freq = 3
    return with_pear(
        config,
        pear=PearConfig(log_ratio_clip=(-0.05, 0.05), log_weight_clip=(-1.0, 0.7)),
        data=DataConfig(
            train=str(folder / "data.jsonl"), validation=str(folder / "held_out.jsonl"), seq_length=64
        ),
    )
