"""The benchmarks run from end to end on the CPU at toy sizes; their figures are not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAYER = ["--tokens", "64", "--hidden", "16", "--columns", "300", "--chunks", "20", "--dtype", "f32"]
STEP = ["--model", "tiny", "--tokens", "64", "--chunk-tokens", "24", "--precision", "fp32", "--longest"]
SCRIPTS = {
    "output_layer": LAYER,
    "step": [*STEP, "--longest-limit", "512"],
}


def run(script: str, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-W", "ignore", f"benchmarks/{script}.py", "--device", "cpu", "--seconds", "0"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "OUT": str(folder), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_measures_ours_and_megatrons_and_prints_a_table(tmp_path: Path, script: str):
    record, output = run(script, tmp_path, *SCRIPTS[script])
    measured = {row["name"] for row in record["rows"] if "error" not in row}
    assert [row for row in record["rows"] if "error" in row] == []
    assert any(name.startswith("ours") for name in measured)
    assert {"Megatron-Core", "Megatron-Core, fused"} <= measured
    assert f"| {min(measured)} |" in output
    if script == "step":
        assert set(record["longest"].values()) == {512}


def test_attention_is_measured_under_a_mask_and_over_segments(tmp_path: Path):
    record, output = run("attention", tmp_path, "--tokens", "64")
    assert [(row["name"], row["tokens"]) for row in record["rows"]] == [("mask", 64), ("varlen", 64)]
    assert all(row["ms"] > 0 and row["peak_bytes"] >= 0 for row in record["rows"])
    assert "| 64 | varlen |" in output


def test_what_a_kl_and_the_entropy_cost_is_told_from_the_nll(tmp_path: Path):
    record, output = run("token_losses", tmp_path, "--tokens", "32", "--columns", "300", "--k", "4")
    ratios = {row["name"]: row["times_nll"] for row in record["rows"]}
    assert len(ratios) == 8
    assert ratios["pear_loss, NLL"] == 1.0
    assert "| pear_loss, KL of 4 | 32 x 300 bf16 |" in output
