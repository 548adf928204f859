"""`pear-megatron doctor`, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pear_megatron.ops.library import with_cuda
from tests.megatron.runs import write_trajectories


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ,
    )


@pytest.mark.slow
def test_the_report_is_plain_text_and_its_exit_code_says_whether_there_are_faults() -> None:
    done = python("sys.argv = ['pear-megatron', 'doctor']\nfrom pear_megatron.cli import app\napp()")
    assert torch.__version__ in done.stdout
    assert f"CUDA ops{' ' * 16}{'yes' if with_cuda else 'no'}" in done.stdout
    assert "varlen" in done.stdout or torch.cuda.is_available()
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    assert done.returncode == (0 if done.stdout.endswith("\nno faults\n") else 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("sys.modules['pear_megatron._C'] = None", "cannot be loaded: "),
        (
            "import torch, pear_megatron._C as c; c.torch_version = '1.2.3'",
            "were built against torch 1.2.3, and this is",
        ),
    ],
)
def test_an_extension_that_does_not_load_or_fit_is_a_fault(damage: str, said: str) -> None:
    done = python(f"{damage}\nfrom pear_megatron.doctor.report import _ops\nprint(_ops()[0].fault)")
    assert said in done.stdout
    assert "pip install --no-build-isolation" in done.stdout


def test_without_torch_a_command_training_and_the_api_say_so_in_one_sentence(tmp_path: Path) -> None:
    said = "torch is not installed, and everything here needs it"
    no_torch = "sys.modules['torch'] = None"
    data = write_trajectories(tmp_path / "data.jsonl")
    arguments = ["--config", "pear:tiny.yaml", f"data.train={data}", f"output_dir={tmp_path / 'run'}"]
    train = python(f"{no_torch}\nfrom pear_megatron.train.__main__ import main\nmain({arguments!r})")
    assert (train.returncode, train.stdout) == (1, "")
    assert train.stderr.startswith(f"error: {said}")
    assert len(train.stderr.splitlines()) == 1
    api = python(f"{no_torch}\nfrom pear_megatron import pear_loss")
    assert f"ImportError: {said}" in api.stderr
