"""benchmarks/gpu.sh: its parts, and that every command in it is one that its script understands."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PARTS = (
    "tests",
    "training",
    "sanitizer",
    "loss",
    "layer",
    "attention",
    "steps",
    "longest",
    "model",
    "profile",
)


def dry_run(*parts: str) -> str:
    run = subprocess.run(
        [str(SCRIPT), *parts], env={**os.environ, "DRY_RUN": "1"}, capture_output=True, text=True, check=True
    )
    return run.stdout


def names(*parts: str) -> list[str]:
    return re.findall(r"^== ([\w.-]+): ", dry_run(*parts), re.MULTILINE)


def test_every_part_runs_alone_and_all_but_the_profile_run_by_default():
    alone = [name for part in PARTS[:-1] for name in names(part)[1:]]
    assert sorted(names()[1:]) == sorted(alone)
    assert names("profile") == ["build", "profile"]
    assert names("benchmarks") == [
        "build",
        "logprob",
        "token_losses",
        "output_layer",
        "attention",
        *names("steps", "longest")[1:],
        "real_model",
    ]


def test_parts_fit_into_eight_minutes_and_all_into_half_an_hour():
    """By the limits after which a step is stopped, the build's counted every time."""
    text = SCRIPT.read_text()
    step = {name: int(limit) for name, limit in re.findall(r'step "?([\w$-]+)"? (\d+) ', text)}
    step |= {"$tool": 3 * step["$tool"], "step-$model": 2 * step["step-$model"]}
    step |= {"step-longest-$model": 2 * step["step-longest-$model"]}
    limits = {name: limit for name, limit in step.items() if name not in ("wheels", "profile", "build")}
    assert len(limits) == 10
    assert all(step["build"] + limit <= 480 for limit in limits.values())
    assert step["build"] + sum(limits.values()) <= 1800


def test_an_unknown_part_is_refused_and_help_names_all():
    run = subprocess.run([str(SCRIPT), "everything"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "no part everything; there are: tests training sanitizer" in run.stderr
    usage = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    assert all(re.search(rf"^  {part} ", usage, re.MULTILINE) for part in PARTS)


@pytest.mark.parametrize(
    "script", ["logprob", "token_losses", "output_layer", "attention", "step", "real_model"]
)
def test_its_arguments_are_known_to_the_script(script: str, monkeypatch: pytest.MonkeyPatch):
    text = SCRIPT.read_text().replace("\\\n", " ").replace('"$model"', "1b")
    commands = re.findall(rf'"\$PYTHON" benchmarks/{script}\.py ([^\n]*)', text)
    assert commands
    module = importlib.import_module(script)
    for command in commands:
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(command.replace("$model", "1b"))])
        assert module.arguments().device == "cuda"
