"""The command as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pear_megatron.cli import app
from tests.score.jobs import run_job, some_rows, write_jsonl
from tests.score.tiny import save_tiny_llama


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", some_rows(8))


def failure(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, ["score", *map(str, arguments)])
    assert done.exit_code == 1
    return done.stderr


@pytest.mark.slow
def test_command_scores_over_two_ranks_that_it_starts_itself(
    data: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    output, plain = tmp_path / "out.parquet", tmp_path / "plain.parquet"
    command = [sys.executable, "-m", "pear_megatron.cli", "score", "--model", tiny_llama, "--data", data]
    done = subprocess.run(
        [*command, "--output", output, "--tensor-parallel", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "backend megatron: a Hugging Face checkpoint that Megatron-Core can load" in done.stderr
    assert f"wrote {output}: 8 rows" in done.stderr
    run_job(data, plain, tiny_llama)
    columns = [pq.read_table(path)["behavior_logprobs"].to_pylist() for path in (output, plain)]
    for mine, expected in zip(*columns, strict=True):
        np.testing.assert_allclose(mine, expected, atol=5e-6)


def test_errors_are_one_line_and_exit_code_1(data: Path, tiny_llama: Path, tmp_path: Path) -> None:
    common = ("--data", data, "--output", tmp_path / "out.parquet")
    model = ("--model", tiny_llama)
    assert failure(*common) == (
        "error: --model is missing: name the policy that wrote the data, or give --backend import\n"
    )
    biased = save_tiny_llama(tmp_path / "biased", attention_bias=True)
    assert "attention_bias" in failure(*common, "--model", biased, "--backend", "megatron")
    assert "no tensor or pipeline" in failure(*common, *model, "--backend", "hf", "--tensor-parallel", "2")
    assert "num_attention_heads 4 is not divisible" in failure(*common, *model, "--tensor-parallel", "3")
    assert "--as policy takes a model's" in failure(*common, "--backend", "import", "--as", "policy")
    assert "must end in .parquet" in failure("--data", data, "--output", tmp_path / "out.jsonl", *model)
    absent = failure("--data", tmp_path / "*.gz", "--output", tmp_path / "out.parquet", *model)
    assert "no such file; check --data" in absent
    assert sorted(path.name for path in tmp_path.iterdir()) == ["biased", "in.jsonl"]
