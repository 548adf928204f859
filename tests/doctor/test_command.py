"""`pear-megatron doctor`, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from pear_megatron.ops.library import with_cuda


def run(code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.argv = ['pear-megatron', 'doctor']\n{code}\nfrom pear_megatron.cli import app\napp()"
    return subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )


def test_the_report_is_plain_text_and_its_exit_code_says_whether_there_are_faults() -> None:
    done = run()
    assert torch.__version__ in done.stdout
    assert f"CUDA ops{' ' * 16}{'yes' if with_cuda else 'no'}" in done.stdout
    assert "attention" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    assert done.returncode == (0 if done.stdout.rstrip().endswith("no faults") else 1)


def test_a_broken_extension_is_a_fault_and_no_traceback() -> None:
    done = run("sys.modules['pear_megatron._C'] = None")
    assert done.returncode == 1
    assert "cannot be loaded" in done.stdout
    assert "pip install --no-build-isolation" in done.stdout
    assert "Traceback" not in done.stderr


def test_without_torch_every_command_says_so_in_one_sentence(tmp_path: Path) -> None:
    code = "sys.modules['torch'] = None"
    (tmp_path / "data.jsonl").write_text("{}\n")
    validate = f"{code}\nsys.argv = ['pear-megatron', 'validate', {str(tmp_path / 'data.jsonl')!r}]"
    done = run(validate)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: torch is not installed")
    assert len(done.stderr.splitlines()) == 1
    api = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}\nfrom pear_megatron import pear_loss"],
        capture_output=True,
        text=True,
    )
    assert "ImportError: torch is not installed" in api.stderr
