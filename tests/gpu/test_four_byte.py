"""The experiment's kernel (benchmarks/experiments/) on the card against its definition on the host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.device import needs_cuda

pytestmark = needs_cuda
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "start", "size"), [(9000, 0, 8700), (64, 128, 100), (152064, 0, 151936)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_does_what_the_definition_says(dtype, columns, start, size, masked):
    pytest.importorskip("triton")
    from experiments.four_byte import exp_forward_
    from experiments.four_byte_kernel import exp_forward_kernel_

    logits = (4 * torch.randn(40, columns)).to(dtype)
    target, mask = torch.randint(size, (40,)), torch.rand(40) < 0.7 if masked else None
    wanted = logits.cpu()
    host_mask = None if mask is None else mask.cpu()
    with torch.device("cpu"):
        expected = exp_forward_(wanted, target.cpu(), host_mask, start, size)
    stats = exp_forward_kernel_(logits, target, mask, start, size)
    torch.testing.assert_close(stats.cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        logits.cpu(), wanted, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7
    )
