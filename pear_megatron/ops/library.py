"""Loads the extension and describes its ops' outputs without running them (meta kernels)."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from pear_megatron import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        "pear_megatron's compiled ops (pear_megatron._C) cannot be loaded: "
        f"{error}. Build them against the installed torch {torch.__version__} with: "
        "pip install --no-build-isolation ."
    ) from error

ops = torch.ops.pear_megatron
with_cuda: bool = _C.with_cuda
cpu_instruction_set: str = _C.cpu_instruction_set()

LOGPROB_STATISTICS = 3
# Rows of the statistics of weights, in the order of WeightStatistic in csrc/ops.h.
WEIGHT_STATISTICS = (
    "log_ratio",
    "ratio_clipped_low",
    "ratio_clipped_high",
    "weight_at_floor",
    "weight_at_ceiling",
    "weight",
    "effective_sample_size",
)


@torch.library.register_fake("pear_megatron::logprob_forward")
def _(logits: Tensor, target: Tensor, mask: Tensor | None, vocab_start: int, vocab_size: int) -> Tensor:
    return logits.new_empty((LOGPROB_STATISTICS, logits.shape[0]), dtype=torch.float32)


@torch.library.register_fake("pear_megatron::logprob_combine")
def _(stats: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return stats.new_empty(stats.shape[2]), stats.new_empty(stats.shape[2])


@torch.library.register_fake("pear_megatron::logprob_backward")
def _(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    grad: Tensor,
    vocab_start: int,
    vocab_size: int,
) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("pear_megatron::logprob_backward_")
def _(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    grad: Tensor,
    vocab_start: int,
    vocab_size: int,
) -> None:
    return None


@torch.library.register_fake("pear_megatron::statistics_forward")
def _(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    topk_ids: Tensor | None,
    vocab_start: int,
    vocab_size: int,
    entropy: bool,
) -> Tensor:
    k = 0 if topk_ids is None else topk_ids.shape[1]
    return logits.new_empty((logits.shape[0], LOGPROB_STATISTICS + entropy + k), dtype=torch.float32)


@torch.library.register_fake("pear_megatron::statistics_combine")
def _(
    stats: Tensor,
    mask: Tensor | None,
    topk_ids: Tensor | None,
    topk_logprobs: Tensor | None,
    vocab_size: int,
    entropy: bool,
    bucket: bool,
) -> tuple[Tensor, ...]:
    tokens = stats.shape[1]
    with_kl, k = (0, 0) if topk_ids is None else (tokens, topk_ids.shape[1])
    shapes = [(tokens,), (tokens,), (tokens if entropy else 0,), (with_kl,), (with_kl, k), (with_kl, 2)]
    return tuple(stats.new_empty(shape) for shape in shapes)


@torch.library.register_fake("pear_megatron::topk_kl_backward")
def _(logits: Tensor, *of_tokens_and_vocabulary: Tensor | int | None) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("pear_megatron::topk_kl_backward_")
def _(logits: Tensor, *of_tokens_and_vocabulary: Tensor | int | None) -> None:
    return None


@torch.library.register_fake("pear_megatron::segmented_suffix_sum")
def _(x: Tensor, cu_seqlens: Tensor, carry: Tensor | None, exclusive: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("pear_megatron::segment_sum")
def _(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.new_empty(cu_seqlens.shape[0] - 1)


@torch.library.register_fake("pear_megatron::pear_weights")
def _(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    variant: int,
    gamma: float,
    block_size: int,
    ratio_low: float,
    ratio_high: float,
    weight_low: float,
    weight_high: float,
    subtract_mean: bool,
    normalize: bool,
    tau: float | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logprobs), logprobs.new_empty((len(WEIGHT_STATISTICS), 2))
