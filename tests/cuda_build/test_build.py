"""The CUDA build, as far as it can be checked without a GPU: registration, and nvcc's resource report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pear_megatron import _C
from pear_megatron.ops.library import with_cuda

ROOT = Path(__file__).parent.parent.parent
LOG = ROOT / "build" / "ptxas.log"

pytestmark = pytest.mark.skipif(not with_cuda, reason="built without CUDA (PEAR_MEGATRON_CUDA=1 builds it)")

# Threads per multiprocessor that each kernel is meant to run with: 65536 registers are shared by them.
INTENDED_THREADS = {
    "forward_rows": 1024,  # 64 KB of loads in flight
    "backward_rows": 1024,
    "combine_statistics": 768,  # bound to it, it would spill on sm_120
    "sum_segments": 512,  # cooperative: four blocks of 128 must be resident at once
    "scan_segments": 512,
    "weigh_pack": 512,
}

ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>sm_\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def op_names() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name for name in names if name.startswith("pear_megatron::"))


@pytest.fixture(scope="module")
def report() -> dict[tuple[str, str], dict[str, int]]:
    """(mangled kernel, architecture) -> what nvcc said of it last, for the kernels in the extension."""
    if not LOG.exists():
        pytest.skip(f"no {LOG.relative_to(ROOT)}; setup.py build_ext --inplace writes it")
    library = Path(_C.__file__).read_bytes()
    return {
        (m["kernel"], m["arch"]): {name: int(m[name]) for name in ("stack", "stores", "loads", "registers")}
        for m in ENTRY.finditer(LOG.read_text())
        if m["kernel"].encode() in library
    }


def name_of(mangled: str) -> str:
    return next(name for name in INTENDED_THREADS if f"{len(name)}{name}" in mangled)


@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_every_op_has_a_kernel_for(key):
    assert len(op_names()) == 7
    missing = [n for n in op_names() if not torch._C._dispatch_has_kernel_for_dispatch_key(n, key)]
    assert missing == []


def test_it_imports_without_a_gpu():
    """And a CUDA tensor is what it takes to need one."""
    assert _C.with_cuda


def test_every_kernel_is_in_the_report_for_every_architecture(report):
    found = {(name_of(kernel), arch) for kernel, arch in report}
    architectures = {arch for _, arch in report}
    assert "sm_90" in architectures
    assert found == {(name, arch) for name in INTENDED_THREADS for arch in architectures}


def test_no_kernel_spills_registers(report):
    spilling = {key: use for key, use in report.items() if use["stores"] or use["loads"] or use["stack"]}
    assert spilling == {}


def test_registers_allow_the_intended_occupancy(report):
    too_many = {}
    for (kernel, arch), use in report.items():
        rounded = -(-use["registers"] // 8) * 8  # handed out to a warp in eights per thread
        threads = min(INTENDED_THREADS[name_of(kernel)], 1536 if arch == "sm_120" else 2048)
        if rounded * threads > 65536:
            too_many[kernel, arch] = use["registers"]
    assert too_many == {}
