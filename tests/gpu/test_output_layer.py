"""The chunked output layer on the card: memory that does not grow, graphs, no waiting, exact weight gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pear_megatron import PearConfig, linear_logprob, pear_linear_loss
from pear_megatron.ops.output_layer import adds_products_in_float32
from tests.gpu.device import DEVICE, needs_cuda, needs_device
from tests.packs import CONFIGS, config_id

pytestmark = needs_device
HIDDEN, COLUMNS, CHUNK = 64, 4096, 128


def loss_inputs(tokens: int = 600) -> tuple[Tensor, ...]:
    return (
        torch.randn(tokens, HIDDEN).bfloat16(),
        (torch.randn(COLUMNS, HIDDEN) / 8).bfloat16(),
        torch.randint(COLUMNS, (tokens,)),
        -8 - torch.rand(tokens),
        torch.rand(tokens) < 0.7,
        torch.tensor([0, tokens // 3, tokens // 3, tokens], dtype=torch.int32),
    )


def loss_and_gradients(hidden: Tensor, weight: Tensor, *others: Tensor, config: PearConfig) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss, _, _ = pear_linear_loss(*leaves, *others, config, chunk_tokens=CHUNK)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_the_same_bits_run_after_run():
    inputs = loss_inputs()
    first = loss_and_gradients(*inputs, config=PearConfig())
    for _ in range(5):
        again = loss_and_gradients(*inputs, config=PearConfig())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_gradient_is_not_rounded_between_chunks(dtype):
    """2000 chunks of one token add 1 / 512 of a row each: bfloat16 would stop growing at a half."""
    tokens = 2000
    hidden = torch.ones(tokens, 1, dtype=dtype)
    weight = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(2, 1), False
    target = torch.zeros(tokens, dtype=torch.int64)
    linear_logprob(hidden, weight, target, chunk_tokens=1).backward(torch.full((tokens,), 1 / 256))
    expected = torch.tensor([[0.5], [-0.5]]) * tokens / 256
    torch.testing.assert_close(weight.main_grad, expected, rtol=1e-5, atol=0)


@needs_cuda
def test_this_torch_adds_16_bit_products_in_float32():
    """Where it does not, every chunk's product is rounded once, and this says so."""
    assert adds_products_in_float32(torch.empty(0).device, torch.bfloat16)


@needs_cuda
def test_memory_does_not_grow_with_the_logits():
    peaks = []
    for tokens in (2048, 8192):
        inputs = loss_inputs(tokens)
        loss_and_gradients(*inputs, config=PearConfig())
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss_and_gradients(*inputs, config=PearConfig())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    vectors = (8192 - 2048) * (2 * HIDDEN + 200)  # the hidden states' gradient, and [T] vectors
    assert peaks[1] - peaks[0] < vectors
    assert peaks[1] < 8192 * COLUMNS * 2 / 4


@needs_cuda
@pytest.mark.parametrize("config", CONFIGS[::3], ids=config_id)
def test_a_captured_graph_replays_with_new_inputs(config):
    inputs = loss_inputs()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss_and_gradients(*inputs, config=config)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(*inputs, config=config)
    for _ in range(3):
        for x, fresh in zip(inputs[:5], loss_inputs()[:5], strict=True):
            x.copy_(fresh)
        graph.replay()
        expected = loss_and_gradients(*inputs, config=config)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@needs_cuda
def test_nothing_waits_for_the_device():
    inputs = loss_inputs()
    loss_and_gradients(*inputs, config=PearConfig())
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(*inputs, config=PearConfig())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_hundred_tokens_of_a_vocabulary_of_262144_equal_float64():
    columns = 262144
    hidden, weight = torch.randn(200, 8).bfloat16(), torch.randn(columns, 8).bfloat16()
    target = torch.randint(columns, (200,))
    got = linear_logprob(hidden, weight, target, chunk_tokens=64)
    exact = (hidden.cpu().double() @ weight.cpu().double().t()).log_softmax(-1)
    exact = exact.gather(1, target.cpu()[:, None])[:, 0]
    torch.testing.assert_close(got.cpu().double(), exact, rtol=0, atol=0.1)  # logits are bfloat16, up to 16
    assert DEVICE in str(got.device)
