"""What setup.py compiles the CUDA ops for where nobody says; nothing is compiled."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import setuptools
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_110 sm_120", "8.0;9.0+PTX;10.0;12.0"),
        ("sm_50 sm_80 sm_90", "8.0;9.0+PTX"),  # an older toolkit: newer cards compile the PTX
    ],
)
def test_the_default_is_every_card_that_nvcc_knows(monkeypatch, tmp_path, known, wanted):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("PEAR_MEGATRON_CUDA", "0")
    default_architectures = runpy.run_path(str(ROOT / "setup.py"))["default_architectures"]
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --list-gpu-code ] && printf '%s\\n' {known}\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    assert default_architectures() == wanted
