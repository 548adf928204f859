"""Every CPU test of the ops, the weights and the loss, again with the CUDA kernels run on the CPU."""

from __future__ import annotations

import pytest

from pear_megatron.ops import statistics, suffix_sum, weights
from tests.cuda_build.emulated import emulated_ops
from tests.gpu.claims import claims
from tests.ops import test_logprob_tensor_parallel, test_registration, test_suffix_sum


@pytest.fixture(autouse=True)
def _cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (statistics, suffix_sum, weights, test_suffix_sum):
        monkeypatch.setattr(module, "ops", emulated_ops())


# The last two are about the real ops' registration, and about ranks, which are processes of their own.
globals().update(claims(without=(test_registration, test_logprob_tensor_parallel), ranks=False))
