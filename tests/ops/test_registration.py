"""Every compiled op: what torch.library asks of it, and the same bits from any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import pear_megatron.ops  # noqa: F401  (registers them)
from pear_megatron.errors import BuildError
from pear_megatron.ops.library import ops, require_cuda_ops, with_cuda

T, V, BOUNDS = 12, 70, [0, 5, 5, 12]


def op_arguments() -> dict[str, list[tuple]]:
    """Two calls of every op: with its optional arguments and without."""
    logits, target, mask = torch.randn(T, V), torch.randint(64, (T,)), torch.rand(T) < 0.7
    normalizer, grad, x = torch.randn(T, 2), torch.randn(T), torch.randn(T)
    plain = ops.statistics_forward(logits, target, None, 0, 64)
    ids = torch.tensor([[3, 9, -1]] * T, dtype=torch.int32)
    whole, logq = ops.statistics_forward(logits, target, None, 0, 64, ids, True), -1 - torch.rand(T, 3)
    *_, log_pi, terms = ops.statistics_combine(whole[None], None, 64, ids, logq, True, True)
    bf16, cu = logits.bfloat16(), torch.tensor(BOUNDS, dtype=torch.int32)
    weights = (x, -torch.rand(T), mask, cu, 2, 0.99, 3, -0.08, 0.3, -10.0, 5.0)
    backward = (target, None, normalizer, grad, 0, 64)
    with_topk = (target, mask, normalizer, grad, 0, 64, ids, logq, log_pi, terms, x)
    return {
        "statistics_forward": [(logits, target, None, 0, 64), (bf16, target, mask, 0, 64, ids, True)],
        "statistics_combine": [
            (plain[None].repeat(2, 1, 1), None, 64),
            (whole[None].repeat(2, 1, 1), mask, 64, ids, logq, True, True),
        ],
        "statistics_backward": [(logits, *backward), (bf16, *with_topk)],
        "statistics_backward_": [(logits.clone(), *backward), (bf16.clone(), *with_topk)],
        "segmented_suffix_sum": [(x, cu, None, True), (x, cu, torch.randn(3), False)],
        "segment_sum": [(x, cu), (x[:0], cu[:1])],
        "pear_weights": [(*weights, False, False), (*weights, True, True, 2.0, torch.rand(T))],
    }


def registered_ops() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("pear_megatron::") for name in names if name.startswith("pear_megatron::")}


@pytest.mark.parametrize("call", [0, 1], ids=["without_options", "with_options"])
@pytest.mark.parametrize("name", sorted(registered_ops()))
def test_opcheck(name, call):
    torch.library.opcheck(getattr(ops, name).default, op_arguments()[name][call])


@pytest.mark.skipif(with_cuda, reason="this build has CUDA ops")
@pytest.mark.parametrize("name", sorted(registered_ops()))
def test_a_build_without_cuda_ops_says_so_of_cuda_tensors(name):
    """Dispatched as CUDA tensors would be, which a CPU build of torch cannot make."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(
        BuildError, match="tensors are on .*, and pear_megatron's ops were built without CUDA.*PEAR_MEG"
    ):
        getattr(ops, name).default.redispatch(cuda, *op_arguments()[name][1])
    with pytest.raises(BuildError, match="this run is on a GPU"):
        require_cuda_ops()


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restore_threads")
def test_the_number_of_threads_changes_no_bit():
    lengths = torch.randint(0, 400, (40,))
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    tokens = int(cu[-1])
    lp, lb, mask = torch.randn(tokens), -torch.rand(tokens), torch.rand(tokens) < 0.7
    logits, target = torch.randn(300, 5000), torch.randint(5000, (300,))
    grad, carry = torch.randn(300), torch.randn(40)
    ids = torch.stack([torch.randperm(5000)[:7] for _ in range(300)]).int()
    logq, kl_grad = -2 - torch.rand(300, 7), torch.randn(300)

    def everything() -> list[torch.Tensor]:
        stats = ops.statistics_forward(logits, target, None, 0, 5000)
        logprob, normalizer, *_ = ops.statistics_combine(stats[None], None, 5000)
        more = ops.statistics_forward(logits, target, None, 0, 5000, ids, True)
        found = ops.statistics_combine(more[None], None, 5000, ids, logq, True, True)
        backward = (logits, target, None, normalizer, grad, 0, 5000)
        weights = [
            ops.pear_weights(
                lp, lb, mask, cu, variant, 0.99, 3, -0.5, 0.3, -10.0, 5.0, True, variant != 3, 2.0, factor
            )
            for variant in range(5)
            for factor in (None, lp.sigmoid())
        ]
        return [
            logprob,
            ops.statistics_backward(*backward),
            *found,
            ops.statistics_backward(*backward, ids, logq, *found[4:], kl_grad),
            ops.segmented_suffix_sum(lp, cu, carry, True),
            ops.segment_sum(lp, cu),
            *(tensor for pair in weights for tensor in pair),
        ]

    torch.set_num_threads(1)
    expected = everything()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(expected, everything(), strict=True))
