"""The training entry point on the card: precisions, chunks of the output layer and Megatron's own layers agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pear_megatron.megatron.attention import transformer_engine_available
from tests.gpu.device import DEVICE, needs_device
from tests.megatron.ranks import train_runs
from tests.megatron.runs import REPOSITORY, TINY, metrics, write_trajectories
from tests.megatron.test_layouts import TIED, TP
from tests.megatron.test_output_chunks import CHUNKS, needs_output_processor

pytestmark = needs_device


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trajectories(tmp_path_factory.mktemp("data") / "trajectories.jsonl")


def train(folder: Path, data: Path, *overrides: str, steps: int = 6) -> list[dict[str, Any]]:
    """A run in a process of its own, to this step -> metrics."""
    command = [sys.executable, "-m", "pear_megatron.train", "--config", str(TINY), f"data.train={data}"]
    command += [f"output_dir={folder}", f"train.max_steps={steps}", "model.num_attention_heads=2", *overrides]
    command += ["model.num_query_groups=2", "model.kv_channels=64"]  # heads that flash attention takes
    hidden = {} if DEVICE == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **hidden}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    rows = metrics(folder)
    assert len(rows) == steps
    return rows


def assert_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]], relative: float) -> None:
    for row, other in zip(rows, expected, strict=True):
        for key in ("loss", "nll", "grad_norm", "pear/weight", "pear/log_ratio"):
            assert row[key] == pytest.approx(other[key], rel=relative, abs=1e-4), (row["step"], key)


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("float32") / "run", data)


def test_bf16_follows_float32(tmp_path: Path, data: Path, float32: list[dict[str, Any]]) -> None:
    """On a card with Transformer Engine: its layers and packed rows (thd) against local ones and a mask."""
    assert_same(train(tmp_path / "bf16", data, "train.precision=bf16"), float32, relative=5e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_over_segments_trains_as_under_a_mask(tmp_path: Path, data: Path, precision: str) -> None:
    options = [f"train.precision={precision}", "train.attention="]
    varlen, mask = (
        train(tmp_path / name, data, options[0], options[1] + name) for name in ("varlen", "mask")
    )
    assert_same(varlen, mask, relative=1e-4 if precision == "fp32" else 5e-2)


@needs_output_processor
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_chunks_of_the_output_layer_train_alike(
    tmp_path: Path, data: Path, float32: list[dict[str, Any]], precision: str
) -> None:
    rows = train(tmp_path / "chunks", data, f"train.precision={precision}", "train.output_chunk_tokens=50")
    assert_same(rows, float32, relative=1e-4 if precision == "fp32" else 5e-2)


def test_two_tensor_parallel_ranks_on_one_card_train_like_one(tmp_path: Path, data: Path) -> None:
    """Over gloo, which lets two ranks share a card."""
    (expected,) = train_runs(1, data, {tmp_path / "one": []}).values()
    for rows in train_runs(2, data, {tmp_path / "two": [TP]}).values():
        assert_same(rows, expected, relative=1e-4)


@needs_output_processor
def test_two_tensor_parallel_ranks_on_one_card_share_chunks_of_the_output_layer(
    tmp_path: Path, data: Path
) -> None:
    runs = {tmp_path / "whole": [TIED, TP], tmp_path / "chunks": [TIED, TP, CHUNKS]}
    whole, chunks = train_runs(2, data, runs).values()
    assert_same(chunks, whole, relative=1e-4)


AWARE = ["parallel.use_distributed_optimizer=true", "optimizer.use_precision_aware_optimizer=true"]
OFFLOAD = [*AWARE, "optimizer.optimizer_cpu_offload=true", "optimizer.optimizer_offload_fraction=0.5"]


@pytest.mark.skipif(not transformer_engine_available(), reason="needs Transformer Engine")
@pytest.mark.parametrize(
    ("levers", "relative"),
    [
        ([*AWARE, "optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16"], 5e-2),
        (OFFLOAD, 5e-2),
        (["train.fp8=hybrid", "train.fp8_recipe=tensorwise"], 2e-1),
    ],
    ids=["state in bf16", "state on the host", "fp8"],
)
def test_what_saves_memory_or_time_follows_bf16(
    tmp_path: Path, data: Path, levers: list[str], relative: float
) -> None:
    """Saved after three steps, continued in another process."""
    expected = train(tmp_path / "bf16", data, "train.precision=bf16")
    options = ["train.precision=bf16", *levers, "optimizer.lr_decay_steps=6"]
    train(tmp_path / "run", data, *options, steps=3)
    assert_same(train(tmp_path / "run", data, *options), expected, relative)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, data: Path) -> None:
    """Saved in the background after three steps, continued in another process."""
    constant = ["optimizer.lr_decay_style=constant", "checkpoint.async_save=true"]
    expected = train(tmp_path / "straight", data, *constant)
    train(tmp_path / "run", data, *constant, steps=3)
    assert_same(train(tmp_path / "run", data, *constant), expected, relative=1e-5)
