"""The ways through the output layer that benchmarks/output_layer.py compares: hidden states to loss and gradients.

Each entry of VARIANTS makes a function (hidden [T, H], weight [V, H], case) -> loss, a scalar that can be
differentiated. Ours compute PEAR's token variant; other people's take given weights, which is less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from experiments.four_byte import four_byte_logprob
from experiments.one_sweep import one_sweep_loss
from measure import single_process_group
from peers import Case, Unavailable, weighted
from torch import Tensor
from torch.autograd.function import once_differentiable

from pear_megatron import PearConfig, pear_linear_loss, pear_loss
from pear_megatron.loss import loss_of_logprobs
from pear_megatron.ops.library import ops
from pear_megatron.ops.output_layer import WeightGradient, chunks_of_logits

CONFIG = PearConfig(variant="token")
Variant = Callable[[Tensor, Tensor, Case], Tensor]


def pear(case: Case) -> tuple[Any, ...]:
    """What pear_loss takes after the logits."""
    return case.ignored, case.behavior, case.mask, case.cu_seqlens, CONFIG


def whole(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    return pear_loss(hidden @ weight.t(), *pear(case), inplace_backward=True)[0]


def four_bytes(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    logprob = four_byte_logprob(hidden, weight, case.ignored, mask=case.mask)
    return loss_of_logprobs(logprob, case.behavior, case.mask, case.cu_seqlens, CONFIG)[0]


def row_sums_stored(chunk_tokens: int) -> Variant:
    """The package's: the second sweep knows every row's log-sum-exp."""

    def loss(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
        return pear_linear_loss(hidden, weight, *pear(case), chunk_tokens=chunk_tokens)[0]

    return loss


class _TwoSweeps(torch.autograd.Function):
    """linear_logprob without anything stored: the second sweep reduces every row again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor, chunk_tokens: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, target, mask)
        ctx.chunk_tokens = chunk_tokens
        out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        for rows, logits in chunks_of_logits(hidden, weight, chunk_tokens):
            stats = ops.statistics_forward(logits, target[rows], mask[rows], 0, weight.shape[0])
            out[rows] = ops.statistics_combine(stats[None], mask[rows], weight.shape[0])[0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, mask = ctx.saved_tensors
        grad_hidden, total = torch.empty_like(hidden), WeightGradient(weight)
        for rows, logits in chunks_of_logits(hidden, weight, ctx.chunk_tokens):
            args = (target[rows], mask[rows])
            stats = ops.statistics_forward(logits, *args, 0, weight.shape[0])
            normalizer = ops.statistics_combine(stats[None], mask[rows], weight.shape[0])[1]
            ops.statistics_backward_(logits, *args, normalizer, grad[rows].contiguous(), 0, weight.shape[0])
            torch.mm(logits, weight, out=grad_hidden[rows])
            total.add_product(logits.t(), hidden[rows])
        return grad_hidden, total.gradient(), None, None, None


def reduced_twice(chunk_tokens: int) -> Variant:
    def loss(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
        logprob = _TwoSweeps.apply(hidden, weight, case.ignored, case.mask, chunk_tokens)
        return loss_of_logprobs(logprob, case.behavior, case.mask, case.cu_seqlens, CONFIG)[0]

    return loss


def from_the_end(chunk_tokens: int) -> Variant:
    def loss(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
        return one_sweep_loss(hidden, weight, *pear(case), chunk_tokens=chunk_tokens)

    return loss


def torch_plain(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    logits = hidden @ weight.t()
    return weighted(F.cross_entropy(logits.float(), case.ignored, reduction="none"), case)


def megatron(device: torch.device, fused: bool) -> Variant:
    single_process_group(device)
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()

    def loss(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
        logits, target = (hidden @ weight.t())[:, None], case.target[:, None]
        if fused:
            return weighted(fused_vocab_parallel_cross_entropy(logits, target, group), case)
        return weighted(vocab_parallel_cross_entropy(logits, target), case)

    return loss


def liger(device: torch.device) -> Variant:
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
        result = liger_fused_linear_cross_entropy(hidden, weight, case.ignored, reduction="sum")
        return result[0] if isinstance(result, tuple) else result

    return loss


def cut_cross_entropy(device: torch.device) -> Variant:
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, case: weighted(
        linear_cross_entropy(hidden, weight, case.ignored, reduction="none"), case
    )


def variants(chunks: list[int]) -> dict[str, Callable[[torch.device], Variant]]:
    """Name -> what makes it for a device, or raises Unavailable or ImportError."""
    ours: dict[str, Callable[[torch.device], Variant]] = {
        "ours, whole logits": lambda device: whole,
        "ours, four bytes": lambda device: four_bytes,
    }
    for n in chunks:
        ours[f"ours, chunks of {n}"] = lambda device, n=n: row_sums_stored(n)
        ours[f"ours, chunks of {n}, reduced twice"] = lambda device, n=n: reduced_twice(n)
        ours[f"ours, chunks of {n}, one sweep from the end"] = lambda device, n=n: from_the_end(n)
    return {
        **ours,
        "Megatron-Core": lambda device: megatron(device, fused=False),
        "Megatron-Core, fused": lambda device: megatron(device, fused=True),
        "Liger, fused linear (unweighted)": liger,
        "cut-cross-entropy": cut_cross_entropy,
        "torch": lambda device: torch_plain,
    }
