"""By trajectory, each one counts once: on every layout, and with context-parallel ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.megatron.ranks import final_weights, train_runs
from tests.megatron.runs import metrics
from tests.megatron.test_context_parallel import CP, train_without_attention
from tests.megatron.test_layouts import DISTRIBUTED, PP, TP, VPP, assert_same_run, assert_same_weights

BY_TRAJECTORY = "train.loss_normalization=trajectory"


def test_every_layout_trains_as_one_process(tmp_path: Path, data: dict[str, Path]) -> None:
    one, token = tmp_path / "one", tmp_path / "token"
    by_token = train_runs(1, data["near"], {one: [BY_TRAJECTORY], token: []})[token]
    layouts = {
        1: {"micro-batches-of-eight": ["train.micro_batch_size=8"]},
        2: {"TP2": [TP], "DP2": [DISTRIBUTED], "PP2xVPP2": [PP, VPP]},
    }
    folders: list[Path] = []
    for world, runs in layouts.items():
        runs_here = {tmp_path / name: [BY_TRAJECTORY, *extra] for name, extra in runs.items()}
        for rows in train_runs(world, data["near"], runs_here).values():
            assert_same_run(rows, metrics(one), relative=1e-5)
        folders += runs_here
    reference, *others = final_weights(one, *folders)
    for folder, weights in zip(folders, others, strict=True):
        assert_same_weights(folder.name, weights, reference)
    first, other = metrics(one)[0], by_token[0]
    assert first["loss"] != pytest.approx(other["loss"], rel=1e-4)
    assert first["decisions"] == other["decisions"]
    assert first["nll"] == other["nll"]  # of the same weights, and per token either way


def test_context_parallel_ranks_count_each_trajectory_once(tmp_path: Path, data: dict[str, Path]) -> None:
    common = ["data.packing=false", BY_TRAJECTORY]
    assert train_without_attention(1, data["near"], {tmp_path / "one": common}) == [True]
    runs = {
        tmp_path / "CP2": [*common, CP],
        tmp_path / "CP2-more": [*common, CP, "train.micro_batch_size=4"],
    }
    assert train_without_attention(2, data["near"], runs) == [True, True]
    runs4 = {tmp_path / "CP2xDP2": [*common, CP, DISTRIBUTED], tmp_path / "PP2xCP2": [*common, CP, PP]}
    assert train_without_attention(4, data["near"], runs4) == [True, True]
    for folder in (*runs, *runs4):
        assert_same_run(metrics(folder), metrics(tmp_path / "one"), relative=1e-5)
