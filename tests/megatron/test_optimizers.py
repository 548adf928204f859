"""The optimizer's kinds and places train as the plain one does, resume, and are refused where they cannot run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pear_megatron.megatron.optimizer import optimizer_config
from tests.megatron.ranks import failures, train_runs
from tests.megatron.runs import metrics, without_times
from tests.megatron.test_layouts import assert_same_run
from tests.megatron.test_moe import EP, MIXTURE
from tests.megatron.test_resume import interrupted_copy
from tests.plan import small

DISTRIBUTED = "parallel.use_distributed_optimizer=true"
TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
AWARE = "optimizer.use_precision_aware_optimizer=true"
SAVING = "checkpoint.save_interval=2"
BF16 = [DISTRIBUTED, "train.precision=bf16", SAVING]
OFFLOAD = [*BF16, AWARE, "optimizer.optimizer_cpu_offload=true"]
MUON = ["optimizer.optimizer=muon", "optimizer.muon_extra_scale_factor=0.2", SAVING]

newer_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron.core.optimizer.emerging_optimizers") is None,
    reason="megatron-core 0.16 has Muon with other settings, and asks for Transformer Engine's version",
)
without_transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="it is there"
)


@pytest.mark.slow
@newer_megatron
def test_state_on_the_host_trains_the_same_bits_and_moves_there_and_back(
    tmp_path: Path, trajectories: Path
) -> None:
    half = [*OFFLOAD, "optimizer.optimizer_offload_fraction=0.5"]
    plain, *offloaded = train_runs(
        2, trajectories, {tmp_path / "gpu": BF16, tmp_path / "host": OFFLOAD, tmp_path / "half": half}
    ).values()
    copies = {
        interrupted_copy(tmp_path / before, tmp_path / f"{before} to {after}", 2): extra
        for before, after, extra in (("half", "half", half), ("host", "gpu", BF16), ("gpu", "host", OFFLOAD))
    }
    for rows in [*offloaded, *train_runs(2, trajectories, copies).values()]:
        assert without_times(rows) == without_times(plain)


@pytest.mark.slow
@newer_megatron
def test_muon_trains_on_every_layout_as_on_one_process_and_resumes(
    tmp_path: Path, trajectories: Path
) -> None:
    pytest.importorskip("emerging_optimizers")
    train_runs(1, trajectories, {tmp_path / "one": MUON, tmp_path / "adam": []})
    one = metrics(tmp_path / "one")
    assert one[-1]["loss"] != metrics(tmp_path / "adam")[-1]["loss"]
    again = interrupted_copy(tmp_path / "one", tmp_path / "again", 2)
    (resumed,) = train_runs(1, trajectories, {again: MUON}).values()
    assert without_times(resumed) == without_times(one)
    layouts = {
        tmp_path / "TP2": [*MUON, TP],
        tmp_path / "PP2": [*MUON, PP],
        tmp_path / "DP2": MUON,
        interrupted_copy(tmp_path / "one", tmp_path / "one-to-TP2", 2): [*MUON, TP],
    }
    for rows in train_runs(2, trajectories, layouts).values():
        assert_same_run(rows, one, relative=1e-4)


@pytest.mark.slow
@newer_megatron
def test_muon_takes_experts_on_their_ranks(tmp_path: Path, trajectories: Path) -> None:
    pytest.importorskip("emerging_optimizers")
    (one,) = train_runs(1, trajectories, {tmp_path / "one": [*MUON, *MIXTURE]}).values()
    runs = {tmp_path / "EP2": [*MUON, *MIXTURE, EP]}
    (split,) = train_runs(2, trajectories, runs).values()
    assert_same_run(split, one, relative=1e-4)
    again = {interrupted_copy(tmp_path / "EP2", tmp_path / "again", 2): runs[tmp_path / "EP2"]}
    (resumed,) = train_runs(2, trajectories, again).values()
    assert without_times(resumed) == without_times(split)


def test_megatron_takes_the_settings_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its OptimizerConfig looks at the signature of Transformer Engine's Adam, which does not import here."""
    from megatron.core.optimizer import optimizer_config as megatron

    class FusedAdam:
        def __init__(self, master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype, use_decoupled_grad):  # type: ignore[no-untyped-def]
            raise AssertionError

    optimizers = ModuleType("transformer_engine.pytorch.optimizers")
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, optimizers.__name__, optimizers)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(megatron, "is_te_min_version", lambda version: True)
    settings = {
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": "bf16",
        "main_params_dtype": "fp16",
        "exp_avg_dtype": "bf16",
        "exp_avg_sq_dtype": "fp8",
    }
    distributed = {"use_distributed_optimizer": True}
    found = optimizer_config(small.recipe(optimizer=settings, parallel=distributed))
    assert found.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    dtypes = (found.main_grads_dtype, found.main_params_dtype, found.exp_avg_dtype, found.exp_avg_sq_dtype)
    assert dtypes == (torch.bfloat16, torch.float16, torch.bfloat16, torch.uint8)
    offload = {
        "use_precision_aware_optimizer": True,
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.25,
    }
    found = optimizer_config(small.recipe(optimizer=offload, parallel=distributed))
    assert (found.optimizer_cpu_offload, found.optimizer_offload_fraction) == (True, 0.25)


@without_transformer_engine
def test_what_needs_transformer_engine_is_refused_by_its_key_before_anything_runs(
    tmp_path: Path, trajectories: Path
) -> None:
    two = [TP, "parallel.sequence_parallel=true", "train.precision=bf16"]
    for extra, said in (
        ([*BF16, AWARE, "optimizer.exp_avg_dtype=bf16"], "optimizer.use_precision_aware_optimizer needs"),
        ([*two, "parallel.tp_comm_overlap=true"], "parallel.tp_comm_overlap True needs a GPU, Transformer"),
        ([*two, "train.fp8=e4m3", "train.fp8_recipe=blockwise"], "train.fp8 e4m3 needs a GPU, Transformer"),
    ):
        assert all(said in error for error in failures(2, trajectories, tmp_path / "run", *extra))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("emerging_optimizers") is not None, reason="it is there")
def test_muon_without_its_package_is_refused_with_the_way_out() -> None:
    from pear_megatron.recipe import RecipeError

    with pytest.raises(
        RecipeError, match=r"needs (NVIDIA's emerging-optimizers|a newer megatron-core).*=adam"
    ):
        optimizer_config(small.recipe(optimizer={"optimizer": "muon"}))
