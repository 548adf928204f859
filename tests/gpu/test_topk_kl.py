"""The KL of a stored top-k and the entropy on the card: large rows, graphs, no waiting, the same bits run after run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from pear_megatron import PearConfig, pear_loss
from pear_megatron.ops.library import ops
from tests.gpu.claims import to
from tests.gpu.device import DEVICE, needs_cuda, needs_device
from tests.gpu.test_kernels import integer, loss_inputs
from tests.ops.test_logprob import DTYPES
from tests.ops.test_statistics import TAILS, Problem, assert_close

pytestmark = needs_device
CONFIGS = [
    PearConfig(base_loss="kl", report_entropy=True),
    PearConfig(base_loss="kl", kl_weight=0.5, kl_tail="bucket"),
    PearConfig(report_entropy=True),
]


def test_random_shapes_equal_float64_on_the_host():
    for i in range(60):
        columns = integer(1, [40, 3000, 40_000][i % 3])
        with torch.device("cpu"):
            problem = Problem.random(integer(1, 20), columns, min(integer(1, 129), columns), DTYPES[i % 3])
        tail = TAILS[i % 2]
        lp, kl, entropy, exact = problem.exact(tail)
        for inplace in (False, True):
            found, gradient = to(DEVICE, problem).ours(tail, inplace_backward=inplace)
            for got, wanted in zip(found, (lp, kl, entropy), strict=True):
                torch.testing.assert_close(got.detach().cpu().double(), wanted, rtol=1e-5, atol=1e-5)
            assert_close(gradient.cpu(), exact, problem.logits.dtype)


def random_topk(tokens: int, columns: int, k: int = 64) -> tuple[Tensor, Tensor]:
    logprobs, ids = torch.randn(tokens, columns).log_softmax(-1).topk(k)
    return ids.int(), logprobs


def loss_and_gradient(
    logits: Tensor, *others: Tensor, topk: tuple[Tensor, Tensor], config: PearConfig
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss, _, _ = pear_loss(leaf, *others, config, behavior_topk=topk)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def test_the_same_bits_run_after_run():
    inputs, topk = loss_inputs(), random_topk(600, 3001)
    for config in CONFIGS:
        first = loss_and_gradient(*inputs, topk=topk, config=config)
        for _ in range(5):
            again = loss_and_gradient(*inputs, topk=topk, config=config)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_cuda
def test_a_row_past_2_to_the_31_elements_is_found():
    rows, columns = 8200, 262144
    wanted = torch.tensor([0, 4095, 8191, 8192, 8199])
    with torch.device("cpu"):
        small = Problem.random(5, columns, 64, torch.bfloat16)
    small.mask[:] = True
    lp, kl, entropy, exact = small.exact("bucket")

    def spread(x: Tensor) -> Tensor:
        whole = torch.zeros(rows, *x.shape[1:], dtype=x.dtype)
        whole[wanted] = x.to(DEVICE)
        return whole

    logits = torch.empty(rows, columns, dtype=torch.bfloat16).fill_(float("nan"))
    logits[wanted] = small.logits.to(DEVICE)
    rest = {f.name: spread(getattr(small, f.name)) for f in fields(small) if f.name != "logits"}
    problem = replace(small, logits=logits, **rest)
    of_token = (problem.target, problem.mask)
    stats = ops.statistics_forward(logits, *of_token, 0, columns, problem.ids, True)
    found = ops.statistics_combine(
        stats[None], problem.mask, columns, problem.ids, problem.logprobs, True, True
    )
    for got, expected in ((found[0], lp), (found[2], entropy), (found[3], kl)):
        torch.testing.assert_close(got[wanted].cpu().double(), expected, rtol=1e-5, atol=1e-5)
    topk = (problem.ids, problem.logprobs, found[4], found[5], problem.kl_grad)
    ops.statistics_backward_(logits, *of_token, found[1], problem.grad, 0, columns, *topk)
    assert_close(logits[wanted].cpu(), exact, torch.bfloat16)
    assert not logits[~problem.mask].any()


@needs_cuda
@pytest.mark.parametrize("config", CONFIGS, ids=["kl", "bucket", "entropy"])
def test_a_captured_graph_replays_with_new_inputs(config):
    inputs, topk = loss_inputs(), random_topk(600, 3001)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss_and_gradient(*inputs, topk=topk, config=config)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(*inputs, topk=topk, config=config)
    for _ in range(3):
        fresh = (*loss_inputs()[:4], *random_topk(600, 3001))
        for x, value in zip((*inputs[:4], *topk), fresh, strict=True):
            x.copy_(value)
        graph.replay()
        expected = loss_and_gradient(*inputs, topk=topk, config=config)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@needs_cuda
def test_nothing_waits_for_the_device():
    inputs, topk = loss_inputs(), random_topk(600, 3001)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for config in CONFIGS:
            loss_and_gradient(*inputs, topk=topk, config=config)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_forward_and_inplace_backward_allocate_under_a_hundredth_of_the_logits():
    inputs, topk = loss_inputs(tokens=1024, columns=128_000), random_topk(1024, 128_000)
    logits = inputs[0].requires_grad_() * 1.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, _, _ = pear_loss(logits, *inputs[1:], CONFIGS[0], behavior_topk=topk, inplace_backward=True)
    torch.autograd.grad(loss, logits)
    assert torch.cuda.max_memory_allocated() - before < logits.nbytes / 100


@needs_cuda
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 50], "outside the vocabulary"),
        ([1, 1], "twice in a token's top-k"),
        ([-1, -1], "no entry of any mass"),
    ],
)
def test_a_top_k_that_is_none_is_a_device_side_assertion(ids, message):
    script = (
        "import torch; from pear_megatron import *; torch.set_default_device('cuda'); "
        f"vocab_parallel_topk_kl(torch.randn(1, 50), torch.tensor([{ids}]).int(), -torch.ones(1, 2)); "
        "torch.cuda.synchronize()"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert run.returncode != 0
    assert message in run.stderr + run.stdout
