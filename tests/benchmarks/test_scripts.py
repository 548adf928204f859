"""The benchmarks run from end to end on the CPU at toy sizes; their figures are not looked at."""

from __future__ import annotations

import json
import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import _FORKSERVER

ROOT = Path(__file__).parents[2]
LAYER = ["--tokens", "64", "--hidden", "16", "--columns", "300", "--chunks", "20", "--dtype", "f32"]
STEP = ["--model", "tiny", "--tokens", "64", "--chunk-tokens", "24", "--precision", "fp32", "--longest"]
SCRIPTS = {
    "output_layer": LAYER,
    "step": [*STEP, "--longest-limit", "512"],
}


def run_script(script: Path, arguments: list[str], folder: Path) -> None:
    """What `python -W ignore benchmarks/script.py` does, in a process that has imported torch already."""
    with (folder / "said").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.chdir(ROOT)
    os.environ |= {"OUT": str(folder), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def run(script: str, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    words = ["--device", "cpu", "--seconds", "0", *arguments]
    process = _FORKSERVER.Process(
        target=run_script, args=(ROOT / "benchmarks" / f"{script}.py", words, folder)
    )
    process.start()
    process.join()
    said = (folder / "said").read_text()
    assert process.exitcode == 0, said[-3000:]
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), said


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
