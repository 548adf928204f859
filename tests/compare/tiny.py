"""A comparison that takes seconds: the stretches world, one base step, three offline steps, two of GRPO."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.megatron.runs import REPOSITORY

RECIPES = REPOSITORY / "recipes"
# An untrained model is right about one time in three: there is something to learn, and something to tell apart.
GRADER = """
def grade(response, answer, problem):
    first = response.split()[:1]
    return float(bool(first) and first[0].isdigit() and int(first[0]) < 12)
"""
# PYTHONPATH is that of the commands that prepare, too.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Everything that a comparison can have; ``changes`` replace top-level keys."""
    train = f"python -m pear_megatron.train --config {RECIPES / 'sft' / 'stretches_base.yaml'}"
    data = "data.train={prepared}/data/%s.jsonl data.tokenizer={prepared}/data/tokenizer"
    sizes = "--num-base 64 --num-offline 48 --num-heldout 4"
    return {
        "output_dir": str(folder / "out"),
        "prepare": [
            f"python -m examples.stretches.make_data --out {{prepared}}/data --seed {{seed}} {sizes}",
            f"{train} {data % 'base'} output_dir={{prepared}}/base seed={{seed}} train.max_steps=1",
        ],
        "seeds": [0],
        "offline": {
            "recipe": str(RECIPES / "sft" / "stretches.yaml"),
            "overrides": [
                "checkpoint.pretrained={prepared}/base",
                *(data % "offline").split(),
                "train.max_steps=3",
                "train.global_batch_size=16",
                "train.micro_batch_size=8",
            ],
            "processes": 2,
        },
        "rl": {
            "recipe": str(RECIPES / "grpo_trl" / "stretches.yaml"),
            "overrides": [
                "data.train.jsonl={prepared}/data/problems.jsonl",
                "data.validation.jsonl={prepared}/data/heldout.jsonl",
                f"data.train.grader={folder / 'grader.py'}",
                f"data.validation.grader={folder / 'grader.py'}",
                "grpo.max_num_steps=2",
                "grpo.num_prompts_per_step=2",
                "grpo.num_generations_per_prompt=4",
                "policy.train_micro_batch_size=8",
                "policy.optimizer.kwargs.lr=1.0e-2",
                "checkpointing.save_period=1",
            ],
        },
        "eval": {"num_samples": 2, "k": [1, 2]},
        # The two arms on layouts of their own: two data-parallel ranks, and two tensor-parallel ones.
        "arms": {
            "SFT": ["pear.variant=none"],
            "token": ["pear.variant=token", "parallel.tensor_model_parallel_size=2"],
            "no offline phase": None,
        },
        "baseline": "SFT",
        "tune": {"seed": 100, "values": [2e-3, 4e-3]},
        **changes,
    }


def write(folder: Path, **changes: Any) -> Path:
    """The comparison as a file."""
    path = folder / "compare.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grader.py").write_text(GRADER)
    path.write_text(yaml.safe_dump(values(folder, **changes), sort_keys=False))
    return path


def command(config: Path, *overrides: str) -> list[str]:
    """``pear-megatron compare``."""
    name = [sys.executable, "-W", "ignore", "-m", "pear_megatron.cli", "compare", "--jobs", "1"]
    return [*name, "--config", str(config), *overrides]


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    """The command at work, in a process group of its own."""
    return subprocess.Popen(
        command(config, *overrides),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def compare(config: Path, *overrides: str, code: int = 0) -> str:
    """The command in this process (its stages are forked from the tests' server) -> what it said."""
    from pear_megatron.cli import app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
        patch.chdir(REPOSITORY)
        done = CliRunner().invoke(app, ["compare", "--jobs", "1", "--config", str(config), *overrides])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def results(folder: Path) -> dict[str, Any]:
    """results.json."""
    content: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return content


def logs(folder: Path) -> dict[str, int]:
    """Every log and how long it is: what a command that has nothing to do leaves as it was."""
    return {str(path): path.stat().st_size for path in sorted((folder / "out").rglob("*.log"))}
