"""What the server imports once, from which the processes of a comparison on the CPU are forked."""

from __future__ import annotations

import importlib
import warnings

from pear_megatron.megatron import cpu

with (
    warnings.catch_warnings(),
    cpu._without_compiler(),
):  # as on CPU; importing alone changes nothing in torch
    warnings.simplefilter("ignore")  # of missing Transformer Engine and Apex
    for name in (
        "megatron.core.tensor_parallel",
        "megatron.core.models.gpt",
        "megatron.core.models.gpt.gpt_layer_specs",
        "megatron.core.optimizer",
        "megatron.core.dist_checkpointing",
        "megatron.core.pipeline_parallel",
        "torch._dynamo",  # which torch's optimizers import
        "torch.utils.tensorboard",
        "hydra._internal.config_loader_impl",
        "pear_megatron.megatron.trainer",
        "pear_megatron.compare.stages",
        "trl",
    ):
        importlib.import_module(name)
