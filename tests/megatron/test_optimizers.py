"""The optimizer's kinds and places train as the plain one does, resume, and are refused where they cannot run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.megatron.ranks import failures, train_runs
from tests.megatron.runs import metrics, without_times
from tests.megatron.test_layouts import assert_same_run
from tests.megatron.test_resume import interrupted_copy

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
