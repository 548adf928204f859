"""Megatron-Core's own configs take a recipe's FP8, overlap and gradients, as they are built on a GPU."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from pear_megatron.megatron.userbuffers import start_userbuffers
from tests.distributed import run_ranks
from tests.plan import small


def _configs(_rank: int) -> tuple[Any, ...]:
    from pear_megatron.megatron.layout import initialize
    from pear_megatron.megatron.model import build_model, transformer_config, wrap_ddp

    recipe = small.recipe(train={"fp8": "hybrid", "fp8_recipe": "tensorwise"})
    plain = recipe.train.model_copy(update={"fp8": None, "fp8_recipe": None})  # there is no GPU
    layout = initialize(recipe.model, recipe.parallel, plain)
    split = dataclasses.replace(layout, tp_size=2, sequence_parallel=True, tp_comm_overlap=True)
    config = transformer_config(recipe.model, split, recipe.train)
    ddp = wrap_ddp(build_model(recipe.model, layout, plain), recipe.parallel, grads_in_fp32=False)
    gradients = {buffer.grad_data.dtype for buffer in ddp.buffers}
    return config.fp8, config.fp8_recipe, config.fp8_param, config.tp_comm_overlap, gradients


def test_megatron_takes_fp8_overlap_and_gradients_in_bf16() -> None:
    (found,) = run_ranks(1, _configs)
    assert found == ("hybrid", "tensorwise", False, True, {torch.bfloat16})


def test_userbuffers_have_the_shape_of_a_micro_batch_on_a_context_parallel_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transformer Engine, which does not import here, is asked for them as Megatron-LM asks."""
    asked: list[dict[str, Any]] = []
    base = ModuleType("transformer_engine.pytorch.module.base")
    base.initialize_ub = lambda **keywords: asked.append(keywords)  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.module"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    start_userbuffers(
        small.recipe(
            train={"micro_batch_size": 2, "fp8": "e4m3", "fp8_recipe": "blockwise"},
            parallel={
                "tensor_model_parallel_size": 4,
                "context_parallel_size": 2,
                "sequence_parallel": True,
                "tp_comm_overlap": True,
            },
        )
    )
    expected = {"shape": [128, 64], "tp_size": 4, "use_fp8": True, "bootstrap_backend": "nccl"}
    assert asked == [expected]
