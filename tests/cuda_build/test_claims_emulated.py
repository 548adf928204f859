"""Every CPU test of the ops, the weights and the loss, again with the CUDA kernels run on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pear_megatron.ops import logprob, statistics, suffix_sum, weights
from tests.cuda_build.emulated import emulated_ops
from tests.gpu.claims import claims
from tests.ops import test_logprob_tensor_parallel, test_registration, test_suffix_sum


@pytest.fixture(autouse=True)
def _cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = emulated_ops()
    names = ("logprob_forward", "logprob_combine", "logprob_backward")
    names += ("statistics_forward", "statistics_combine", "topk_kl_backward")
    names += ("segmented_suffix_sum", "segment_sum", "pear_weights")
    ops = SimpleNamespace(
        **{name: getattr(emulated, name) for name in names},
        logprob_backward_=torch.no_grad()(emulated.logprob_backward_inplace),
        topk_kl_backward_=torch.no_grad()(emulated.topk_kl_backward_inplace),
    )
    for module in (logprob, statistics, suffix_sum, weights, test_suffix_sum):
        monkeypatch.setattr(module, "ops", ops)


# The last two are about the real ops' registration, and about ranks, which are processes of their own.
globals().update(claims(without=(test_registration, test_logprob_tensor_parallel), ranks=False))
