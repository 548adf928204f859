"""The CUDA kernels on the CPU: csrc/cuda compiled by the C++ compiler under emulator/cuda/device.h."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import load

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


@functools.cache
def emulated_ops() -> ModuleType:
    """torch.ops.pear_emulated; the first call compiles it (a minute), later sessions find it built."""
    load(
        name="pear_emulated",
        sources=[str(HERE / "emulator" / "emulated.cpp")],
        # The emulator's cuda/device.h must come before the real one.
        extra_cflags=[
            "-std=c++20",
            "-O1",
            "-g0",
            "-w",
            "-DPEAR_MEGATRON_CUDA",
            f"-I{HERE / 'emulator'}",
            f"-I{CSRC}",
        ],
        is_python_module=False,
    )
    return torch.ops.pear_emulated
