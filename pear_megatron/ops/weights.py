"""Importance weights of a whole pack and their statistics, in one pass."""

from __future__ import annotations

from torch import Tensor

from pear_megatron.config import PearConfig
from pear_megatron.ops.library import WEIGHT_STATISTICS as STATISTICS
from pear_megatron.ops.library import ops

__all__ = ["STATISTICS", "pear_weights"]

_VARIANTS = {"none": 0, "token": 1, "block": 2, "sequence": 3, "own": 4}


def pear_weights(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch.ops.pear_megatron.pear_weights with its settings taken from a PearConfig.

    Args:
        logprobs: [T] float32.
        behavior_logprobs: [T] float32, or what else the ratios are taken against.
        mask: [T] bool, True on decisions.
        cu_seqlens: [segments + 1] int32.
        config: the weights' settings.
        factor: [T] float32, anything off the mask: multiplies the weights after they are normalised; None = 1.

    Returns:
        weights [T] float32, 0 off the mask; statistics [7, 2] float32, a (sum, count) pair per STATISTICS.
    """
    return ops.pear_weights(
        logprobs,
        behavior_logprobs,
        mask,
        cu_seqlens,
        _VARIANTS[config.variant],
        config.gamma,
        config.block_size,
        *config.log_ratio_clip,
        *config.log_weight_clip,
        config.baseline == "sequence_mean",
        config.normalize == "sequence",
        config.tau if config.sequence_scale == "mean" else None,
        factor,
    )
