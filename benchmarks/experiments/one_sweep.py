"""The chunked output layer in one sweep, from the end of the pack to its start: an experiment, not in the package.

A weight of PEAR's token variant depends on the decisions *after* its token alone. Going backwards through the
chunks, everything that a chunk's weights need is known when its logits are there: the sum that enters from the
chunk to the right is one number. So the gradient can be made at once, and the output layer's GEMM runs three times, as
with whole logits, not four. What it costs: gradients are made in forward (the weight's in a float32 tensor of its
own that waits for backward), tensor-parallel ranks would need a collective for each chunk, and ``sequence``,
``baseline``, ``normalize`` and context parallelism, which look at whole trajectories, are out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pear_megatron import PearConfig
from pear_megatron.ops.library import ops
from pear_megatron.ops.output_layer import WeightGradient


class _OneSweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        behavior_logprobs: Tensor,
        mask: Tensor,
        bounds: list[int],
        config: PearConfig,
        chunk_tokens: int,
    ) -> Tensor:
        tokens, columns = hidden.shape[0], weight.shape[0]
        buffer = hidden.new_empty(min(chunk_tokens, tokens), columns)
        grad_hidden, total = torch.empty_like(hidden), WeightGradient(weight.detach())
        loss = hidden.new_zeros((), dtype=torch.float32)
        entering = hidden.new_zeros(1, dtype=torch.float32)  # sum over decisions right of the chunk
        for start in range((tokens - 1) // chunk_tokens * chunk_tokens, -1, -chunk_tokens):
            end = min(start + chunk_tokens, tokens)
            rows = slice(start, end)
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: end - start])
            args = (target[rows], mask[rows])
            stats = ops.statistics_forward(logits, *args, 0, columns)
            logprob, normalizer, *_ = ops.statistics_combine(stats[None], mask[rows], columns)

            inside = [b for b in bounds if start < b < end]
            cu = torch.tensor([0, *(b - start for b in inside), end - start], dtype=torch.int32)
            goes_on = end not in bounds  # the chunk's last trajectory, into the chunk to the right
            carry = hidden.new_zeros(len(inside) + 1, dtype=torch.float32)
            carry[-1:] = entering if goes_on else 0.0
            log_ratio = (logprob - behavior_logprobs[rows]).clamp(*config.log_ratio_clip)
            summand = (log_ratio + math.log(config.gamma)).where(mask[rows], 0.0)
            cu = cu.to(hidden.device)
            log_weight = ops.segmented_suffix_sum(summand, cu, carry, True)
            entering = log_weight[:1] + summand[:1]
            coefficient = log_weight.clamp(*config.log_weight_clip).exp().where(mask[rows], 0.0)

            loss -= torch.dot(coefficient, logprob)
            ops.statistics_backward_(logits, *args, normalizer, -coefficient, 0, columns)
            torch.mm(logits, weight, out=grad_hidden[rows])
            total.add_product(logits.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, total.total)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        rest = (None,) * 6
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.dtype), *rest


def one_sweep_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    *,
    chunk_tokens: int,
) -> Tensor:
    """The loss of pear_linear_loss for the token variant on one rank, gradients made on the way.

    Raises:
        ValueError: settings whose weights need more than the tokens that follow.
    """
    clips = {"log_ratio_clip": config.log_ratio_clip, "log_weight_clip": config.log_weight_clip}
    if config != PearConfig(variant="token", gamma=config.gamma, **clips):
        raise ValueError(f"one sweep knows the token variant with its gamma and clips alone, got {config}")
    bounds = cu_seqlens.tolist()  # a host copy; a loader has one
    args = (target, behavior_logprobs, mask, bounds, config, chunk_tokens)
    return _OneSweep.apply(hidden, weight, *args)
