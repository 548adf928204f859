"""pear_loss inside torch.compile, activation checkpointing and torch.export, and what a CUDA graph may hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from pear_megatron import PearConfig, pear_loss

T, H, V, K = 24, 8, 50, 4
TOKEN = PearConfig()
BLOCK = PearConfig(variant="block", block_size=3, baseline="sequence_mean", normalize="sequence")
KL = PearConfig(base_loss="kl")


def of_tokens(tokens: int = T) -> tuple[Tensor, ...]:
    """target, behavior_logprobs, mask, cu_seqlens."""
    cu_seqlens = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
    return torch.randint(V, (tokens,)), -torch.rand(tokens), torch.rand(tokens) < 0.7, cu_seqlens


def topk() -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(T)])
    return ids.int(), -1.5 - torch.rand(T, K)


class Head(torch.nn.Module):
    """An output layer and the loss behind it."""

    def __init__(self, config: PearConfig, **options: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(H, V, bias=False)
        self.config, self.options = config, options

    def forward(self, hidden: Tensor, *of_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, tokens, report = pear_loss(self.layer(hidden), *of_tokens, self.config, **self.options)
        return loss, tokens, report["nll"]


def values_and_gradients(head: Head, run: Callable[..., Any], hidden: Tensor, *rest: Tensor) -> list[Tensor]:
    leaf = hidden.clone().requires_grad_()
    head.zero_grad()
    found = run(leaf, *rest)
    found[0].backward()
    assert leaf.grad is not None
    assert head.layer.weight.grad is not None
    return [*(x.detach() for x in found), leaf.grad, head.layer.weight.grad.clone()]


@pytest.mark.parametrize(
    ("config", "inplace", "options"),
    [
        (TOKEN, False, {"token_weights": torch.rand(T), "reward": torch.tensor([1.0, -1.0])}),
        (KL, True, {"behavior_topk": topk()}),
        (PearConfig(ratio="reference"), False, {"reference_logprobs": -torch.rand(T)}),
    ],
    ids=["token", "kl_inplace", "reference"],
)
def test_compiled_without_a_graph_break_it_gives_the_same_bits(config, inplace, options):
    head = Head(config, inplace_backward=inplace, **options)
    inputs = torch.randn(T, H), *of_tokens()
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")  # an error at a break
    for ours, expected in zip(
        values_and_gradients(head, compiled, *inputs), values_and_gradients(head, head, *inputs), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_recomputed_in_backward_it_gives_the_same_bits(reentrant, inplace):
    head, inputs = Head(TOKEN, inplace_backward=inplace), (torch.randn(T, H), *of_tokens())

    def recomputed(*inputs: Tensor) -> Any:
        return checkpoint(head, *inputs, use_reentrant=reentrant)

    for ours, expected in zip(
        values_and_gradients(head, recomputed, *inputs),
        values_and_gradients(head, head, *inputs),
        strict=True,
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("config", [TOKEN, BLOCK], ids=["token", "block"])
def test_exported_for_any_number_of_tokens_it_holds_the_ops(config):
    head, tokens = Head(config), torch.export.Dim("tokens", min=2, max=4096)
    dynamic = ({0: tokens}, ({0: tokens}, {0: tokens}, {0: tokens}, None))
    exported = torch.export.export(
        head, (torch.randn(T, H), *of_tokens()), dynamic_shapes=dynamic, strict=False
    )
    called = {str(node.target) for node in exported.graph.nodes}
    assert {
        f"pear_megatron.{op}.default" for op in ("statistics_forward", "statistics_combine", "pear_weights")
    } <= called
    inputs = torch.randn(13, H), *of_tokens(13)
    for ours, expected in zip(exported.module()(*inputs), head(*inputs), strict=True):
        assert torch.equal(ours, expected)


class Devices(TorchDispatchMode):
    """Every operation that touches another device than cuda:0."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.elsewhere = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.operations += 1
        if any(str(x.device) != "cuda:0" for x in tensors):
            self.elsewhere.append(str(function))
        return out


@pytest.mark.parametrize("config", [TOKEN, BLOCK, KL], ids=["token", "block", "kl"])
def test_on_cuda_no_value_is_read_back_and_nothing_is_copied_from_the_host(config):
    """Of what a CUDA graph could not capture: fake CUDA tensors have no values, so that reading one is an error."""
    if config is KL and torch.version.cuda is None:
        pytest.skip("a CPU build of torch cannot view fake CUDA tensors inside an autograd function")
    inputs = torch.empty(T, V), *of_tokens(), torch.empty(T), torch.empty(2), *topk()
    with FakeTensorMode(), torch.no_grad():
        on_card = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in inputs]
        logits, target, behavior, mask, cu_seqlens, token_weights, reward, *stored = on_card
        options = {"token_weights": token_weights, "reward": reward}
        if config is KL:
            options["behavior_topk"] = tuple(stored)
        with Devices() as seen:
            loss, _, _ = pear_loss(logits, target, behavior, mask, cu_seqlens, config, **options)
    assert loss.device.type == "cuda"
    assert seen.operations > 50
    assert seen.elsewhere == []
