"""What the row kernels' machine code asks of a GPU, held below what would make anything but memory the limit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pear_megatron import _C
from pear_megatron.ops.library import with_cuda

pytestmark = pytest.mark.skipif(not with_cuda, reason="built without CUDA (PEAR_MEGATRON_CUDA=1 builds it)")


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "sm_120"])
def loops(request: pytest.FixtureRequest) -> list[Any]:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import sass
    finally:
        sys.path.remove(folder)
    try:
        found = sass.look(Path(_C.__file__), request.param)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    if not found:
        pytest.skip(f"built without {request.param}")
    return found


def test_every_row_kernel_has_a_loop_of_wide_loads(loops):
    kinds = {(loop.kernel, loop.dtype, loop.threads) for loop in loops}
    wanted = [("forward_rows", "backward_rows"), ("bf16", "f16", "f32"), (32, 256, 512)]
    assert kinds == {(k, d, n) for k in wanted[0] for d in wanted[1] for n in wanted[2]}
    assert {loop.access for loop in loops} == {16}
    # Latency times bandwidth: some 30 KB on Hopper; twice that, so that few stalls show.
    assert min(loop.in_flight for loop in loops) >= 64 * 1024


def test_memory_is_the_limit(loops, request):
    # B200 has too few schedulers and exponential units for its bandwidth to leave as much room as the others; the
    # fullest is a top-k beside an entropy.
    most = 0.9 if "sm_100" in request.node.name else 0.6
    busiest = {
        f"{loop.kernel} {loop.dtype} {loop.threads} {loop.more}": shares
        for loop in loops
        if max(shares := tuple(getattr(loop, pipe) for pipe in ("issue", "exp", "alu", "fma"))) > most
    }
    assert busiest == {}
