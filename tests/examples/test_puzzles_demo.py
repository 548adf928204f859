"""The main job on real input, end to end: a real model, its tokenizer, real puzzles, training at TP = 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.puzzles.sample import find_model
from tests.megatron.runs import REPOSITORY, metrics


@pytest.mark.slow
def test_a_real_models_answers_are_trained_on_at_tensor_parallel_two(tmp_path: Path) -> None:
    try:
        find_model()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    done = subprocess.run(
        [sys.executable, "-m", "examples.puzzles.demo", "--output", str(tmp_path), "--num-puzzles", "8"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8
    rows = metrics(tmp_path / "run")
    assert len(rows) == 20
    assert rows[-1]["nll"] < rows[0]["nll"]
