"""Fused kernels are used where they are there, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from pear_megatron.megatron.fusions import fusions
from tests.plan import small

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core, as it is where Transformer Engine and Apex import."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", object())
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)


def used(device: torch.device, **model: object) -> set[str]:
    found = fusions(small.recipe(model=model).model, device)
    return {name for name, fused in found.items() if fused}


def test_a_cpu_run_has_none(kernels: None) -> None:
    assert used(CPU) == set()


def test_a_gpu_run_has_all_that_import(kernels: None) -> None:
    megatrons = {"bias_activation_fusion", "bias_dropout_fusion"}
    assert used(CUDA) == megatrons | {"apply_rope_fusion", "gradient_accumulation_fusion"}
    yarn = {"yarn_rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 32}
    assert used(CUDA, **yarn) == megatrons | {"gradient_accumulation_fusion"}
    learned = used(CUDA, position_embedding_type="learned_absolute")
    assert "apply_rope_fusion" not in learned


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have Transformer Engine or Apex")
def test_a_gpu_run_without_transformer_engine_and_apex_has_megatrons_own() -> None:
    assert used(CUDA) == {"bias_activation_fusion", "bias_dropout_fusion"}
