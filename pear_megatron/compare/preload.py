"""What a server imports once, from which processes that train or evaluate on the CPU are forked.

It runs nothing of it: a process that has used threads, or a process group, must not be forked.
"""

from __future__ import annotations

import importlib
import warnings
from contextlib import suppress

from pear_megatron.megatron import cpu

_TRAINING = (
    "megatron.core.tensor_parallel",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.pipeline_parallel",
    "torch._dynamo",  # which torch's optimizers import
    "torch.utils.tensorboard",
    "hydra._internal.config_loader_impl",
    "pear_megatron.train.trainer",
    "pear_megatron.megatron.core_attention",
    "pear_megatron.megatron.checkpoint.export",
)
# Of extras that may be missing. transformers and trl import by name only what is asked for.
_EVALUATION_AND_RL = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "pear_megatron.compare.stages",
    "pear_megatron.evaluate.run",
    "scipy.stats",
    "trl.trainer.grpo_trainer",
    "pear_megatron.rl.trl.run_folder",
)

# As on CPU; importing alone changes nothing in torch.
with warnings.catch_warnings(), cpu._without_compiler():
    warnings.simplefilter("ignore")  # of missing Transformer Engine and Apex
    for name in _TRAINING:
        importlib.import_module(name)
    for name in _EVALUATION_AND_RL:
        with suppress(ImportError):
            importlib.import_module(name)
