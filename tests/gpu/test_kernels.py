"""What only a GPU can show: large rows, graphs, streams, memory, and the same bits run after run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pear_megatron import PearConfig, pear_loss, vocab_parallel_logprob
from pear_megatron.ops.library import ops
from pear_megatron.ops.weights import pear_weights
from tests.gpu.device import DEVICE, needs_cuda, needs_device
from tests.ops.test_logprob import DTYPES, assert_rounds_to, float64_answer
from tests.packs import CONFIGS, SEQUENCE_MEAN, config_id, make_pack

pytestmark = needs_device
GRAPH_CONFIGS = [c for c in CONFIGS if c.normalize == "none" or c.baseline == "none"]


def integer(low: int, high: int) -> int:
    return int(torch.randint(low, high, ()))


def test_a_hundred_random_shapes_equal_float64_on_the_host():
    for i in range(100):
        columns = integer(1, [40, 3000, 40_000][i % 3])
        rows, offset, words = integer(1, 20), integer(0, 17), integer((columns + 1) // 2, columns + 1)
        wide = (4 * torch.randn(rows, columns + 17)).to(DTYPES[integer(0, 3)])
        logits = wide[:, offset : offset + columns] if i % 2 else wide[:, :columns].contiguous()
        target, mask, grad = torch.randint(words, (rows,)), torch.rand(rows) < 0.8, torch.randn(rows)
        target[~mask] = -100
        host = [x.cpu() for x in (logits[:, :words], target, grad, mask)]
        expected, exact = float64_answer(*host)
        stats = ops.statistics_forward(logits, target, mask, 0, words)
        logprob, normalizer, *_ = ops.statistics_combine(stats[None], mask, words)
        torch.testing.assert_close(logprob.cpu().double(), expected, rtol=1e-5, atol=1e-5)
        args = (target, mask, normalizer, grad, 0, words)
        out = ops.statistics_backward(logits, *args)
        assert_rounds_to(out[:, :words].cpu(), exact)
        assert not out[:, words:].any()
        ops.statistics_backward_(logits, *args)
        assert torch.equal(logits, out)


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_off_the_mask_are_zero_whatever_they_hold(inplace):
    logits, target = torch.randn(64, 5003), torch.randint(5003, (64,))
    mask = torch.rand(64) < 0.5
    logits[~mask], target[~mask] = float("nan"), 2**60
    leaf = logits.clone().requires_grad_()
    out = vocab_parallel_logprob(leaf * 1.0, target, mask=mask, inplace_backward=inplace)
    out.sum().backward()
    assert not out[~mask].any()
    assert not leaf.grad[~mask].any()
    assert out[mask].isfinite().all()


@pytest.mark.parametrize("lengths", [[1_000_000], [100] * 10_000, [1] * 10_000, [300_000, 1, 0, 5000] * 3])
@pytest.mark.parametrize("config", [*CONFIGS[::3], SEQUENCE_MEAN], ids=config_id)
@pytest.mark.parametrize("with_factor", [False, True])
def test_weights_of_large_packs_equal_the_hosts(lengths, config, with_factor):
    with torch.device("cpu"):
        pack = make_pack(lengths, spread=0.02)
        factor = torch.rand(len(pack.mask)) if with_factor else None
    expected, expected_stats = pear_weights(
        *pack.inputs(), config, factor
    )  # sums in float64, tested against it
    there = None if factor is None else factor.to(DEVICE)
    weights, stats = pear_weights(*(x.to(DEVICE) for x in pack.inputs()), config, there)
    torch.testing.assert_close(weights.cpu(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.cpu(), expected_stats, rtol=1e-5, atol=1e-5)


def loss_inputs(tokens: int = 600, columns: int = 3001) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(tokens, columns).bfloat16(),
        torch.randint(columns, (tokens,)),
        -8 - torch.rand(tokens),
        torch.rand(tokens) < 0.7,
        torch.tensor([0, tokens // 3, tokens // 3, tokens], dtype=torch.int32),
    )


def loss_and_gradient(logits, *others, config=None) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().requires_grad_()
    loss, _, _ = pear_loss(leaf, *others, config or PearConfig(), inplace_backward=False)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def test_the_same_bits_run_after_run():
    inputs = loss_inputs()
    for config in CONFIGS:
        first = loss_and_gradient(*inputs, config=config)
        for _ in range(5):
            again = loss_and_gradient(*inputs, config=config)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_cuda
def test_a_row_past_2_to_the_31_elements_is_found():
    rows, columns = 8200, 262144
    logits = torch.empty(rows, columns, dtype=torch.bfloat16).fill_(float("nan"))
    wanted = torch.tensor([0, 4095, 8191, 8192, 8199])
    logits[wanted] = torch.randn(5, columns).bfloat16()
    target, grad = torch.randint(columns, (rows,)), torch.randn(rows)
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[wanted] = True
    host = [x[wanted].cpu() for x in (logits, target, grad)]
    expected, exact = float64_answer(*host)
    stats = ops.statistics_forward(logits, target, mask, 0, columns)
    logprob, normalizer, *_ = ops.statistics_combine(stats[None], mask, columns)
    torch.testing.assert_close(logprob[wanted].cpu().double(), expected, rtol=1e-5, atol=1e-5)
    ops.statistics_backward_(logits, target, mask, normalizer, grad, 0, columns)
    assert_rounds_to(logits[wanted].cpu(), exact)
    assert not logits[~mask].any()


@needs_cuda
@pytest.mark.parametrize("config", GRAPH_CONFIGS, ids=config_id)
def test_a_captured_graph_replays_with_new_inputs(config):
    inputs = loss_inputs()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss_and_gradient(*inputs, config=config)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(*inputs, config=config)
    for _ in range(3):
        for x, fresh in zip(inputs[:4], loss_inputs()[:4], strict=True):
            x.copy_(fresh)
        graph.replay()
        expected = loss_and_gradient(*inputs, config=config)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@needs_cuda
def test_nothing_waits_for_the_device():
    inputs = loss_inputs()
    reward = torch.tensor([1.0, 2.0, -1.0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for config in CONFIGS:
            leaf = inputs[0].clone().requires_grad_()
            loss, _, _ = pear_loss(leaf * 1.0, *inputs[1:], config, reward=reward, inplace_backward=True)
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_it_runs_on_the_current_stream():
    inputs = loss_inputs()
    expected = loss_and_gradient(*inputs)
    late = [torch.zeros_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the inputs arrive late, and only on this stream
        for x, value in zip(late, inputs, strict=True):
            x.copy_(value)
        got = loss_and_gradient(*late)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_cuda
def test_forward_and_inplace_backward_allocate_under_a_hundredth_of_the_logits():
    inputs = loss_inputs(tokens=2048, columns=32000)
    logits = inputs[0].requires_grad_() * 1.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, _, _ = pear_loss(logits, *inputs[1:], PearConfig(), inplace_backward=True)
    torch.autograd.grad(loss, logits)
    assert torch.cuda.max_memory_allocated() - before < logits.nbytes / 100


@needs_cuda
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("vocab_parallel_logprob(torch.randn(4, 50), torch.tensor([1, 2, 50, 3]))", "outside the vocabulary"),
        ("segmented_suffix_sum(torch.randn(6), torch.tensor([0, 3, 5]))", "cu_seqlens must start at 0"),
        (
            "importance_weights(-torch.ones(6), torch.full((6,), torch.nan), torch.ones(6).bool(), "
            "torch.tensor([0, 6]), PearConfig())",
            "NaN, infinite or positive",
        ),
        (
            "pear_loss(torch.zeros(2, 9), torch.tensor([1, 2]), -torch.ones(2), torch.ones(2).bool(), "
            "torch.tensor([0, 2]), PearConfig(), token_weights=torch.tensor([1.0, torch.nan]))",
            "token_weights are not finite",
        ),
    ],
)
def test_what_only_the_device_can_see_is_a_device_side_assertion(call, message):
    script = (
        "import torch; from pear_megatron import *; "
        f"torch.set_default_device('cuda'); {call}; torch.cuda.synchronize()"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert run.returncode != 0
    assert message in run.stderr + run.stdout
