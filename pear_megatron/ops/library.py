"""Loads the extension and describes its ops' outputs without running them (meta kernels)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from pear_megatron.errors import BuildError

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps . (in a checkout of pear-megatron)"

try:
    from pear_megatron import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        "pear_megatron's compiled ops (pear_megatron._C) cannot be loaded: "
        f"{error}. Build them against the installed torch {torch.__version__} with: {REBUILD}"
    ) from error

ops = torch.ops.pear_megatron
with_cuda: bool = _C.with_cuda
cpu_instruction_set: str = _C.cpu_instruction_set()
built_for_torch: str = _C.torch_version
built_for_cuda: str = _C.cuda_version  # empty without CUDA ops, as the next
cuda_architectures: tuple[str, ...] = tuple(_C.cuda_architectures.split(",")) if with_cuda else ()


if built_for_torch.split(".")[:2] != torch.__version__.split(".")[:2]:  # it may load, and be wrong
    raise ImportError(
        f"pear_megatron's compiled ops were built against torch {built_for_torch}, and this is torch "
        f"{torch.__version__}, whose C++ interface is another. Build them again: {REBUILD}"
    )


def require_cuda_ops(where: str = "this run is on a GPU") -> None:
    """Refuses a build without CUDA ops.

    Raises:
        BuildError: says so, and how to rebuild.
    """
    if not with_cuda:
        found = torch.version.cuda or "none, so install a CUDA build of torch first"
        raise BuildError(
            f"{where}, and pear_megatron's ops were built without CUDA. Where nvcc is (torch's CUDA: {found}), run "
            f"PEAR_MEGATRON_CUDA=1 {REBUILD}; `pear-megatron doctor` says what there is"
        )


def _refuse_cuda(*arguments: Any) -> NoReturn:
    """What every op does with CUDA tensors in a build without CUDA ops."""
    devices = sorted({str(value.device) for value in arguments if isinstance(value, Tensor)})
    require_cuda_ops(f"tensors are on {' and '.join(devices)}")
    raise AssertionError("registered in builds without CUDA ops alone")


if not with_cuda:
    _cuda = torch.library.Library("pear_megatron", "IMPL", "CUDA")
    for _name in torch._C._dispatch_get_all_op_names():
        if _name.startswith("pear_megatron::"):
            _cuda.impl(_name.removeprefix("pear_megatron::"), _refuse_cuda)

TOKEN_STATISTICS = 3  # without an entropy and a top-k
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


@torch.library.register_fake("pear_megatron::statistics_forward")
def _(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    vocab_start: int,
    vocab_size: int,
    topk_ids: Tensor | None = None,
    entropy: bool = False,
) -> Tensor:
    k = 0 if topk_ids is None else topk_ids.shape[1]
    return logits.new_empty((logits.shape[0], TOKEN_STATISTICS + entropy + k), dtype=torch.float32)


@torch.library.register_fake("pear_megatron::statistics_combine")
def _(
    stats: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    topk_ids: Tensor | None = None,
    topk_logprobs: Tensor | None = None,
    entropy: bool = False,
    bucket: bool = False,
) -> tuple[Tensor, ...]:
    tokens = stats.shape[1]
    with_kl, k = (0, 0) if topk_ids is None else (tokens, topk_ids.shape[1])
    shapes = [(tokens,), (tokens, 2), (tokens if entropy else 0,), (with_kl,), (with_kl, k), (with_kl, 2)]
    return tuple(stats.new_empty(shape) for shape in shapes)


@torch.library.register_fake("pear_megatron::statistics_backward")
def _(logits: Tensor, *of_tokens_and_vocabulary: Tensor | int | None) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("pear_megatron::statistics_backward_")
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
