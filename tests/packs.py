"""Packed trajectories for the tests of weights and loss."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from pear_megatron import PearConfig

VARIANTS = ("token", "block", "own", "sequence", "none")

# Every variant x baseline x normalize that PearConfig allows.
CONFIGS = [
    PearConfig(variant=variant, baseline=baseline, normalize=normalize, gamma=0.98, block_size=3)
    for variant, baseline, normalize in product(VARIANTS, ("none", "sequence_mean"), ("none", "sequence"))
    if (variant, normalize) != ("sequence", "sequence")
]

# A sequence weight that length cannot saturate.
SEQUENCE_MEAN = PearConfig(variant="sequence", sequence_scale="mean", tau=3.0)


def config_id(config: PearConfig) -> str:
    scale = "" if config.sequence_scale == "sum" else "_mean"
    return f"{config.variant}{scale}-baseline_{config.baseline}-normalize_{config.normalize}"


@dataclass
class Pack:
    """Trajectories end to end: [T] each, boundaries in cu_seqlens [S + 1]."""

    logprobs: Tensor
    behavior_logprobs: Tensor
    mask: Tensor
    cu_seqlens: Tensor

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.logprobs, self.behavior_logprobs, self.mask, self.cu_seqlens


def make_pack(lengths: list[int], spread: float = 0.2, decisions: float = 0.7) -> Pack:
    """Random trajectories; log ratios have this spread, this share of tokens are decisions."""
    tokens = sum(lengths)
    behavior = -2 * torch.rand(tokens)
    return Pack(
        logprobs=behavior + spread * torch.randn(tokens),
        behavior_logprobs=behavior,
        mask=torch.rand(tokens) < decisions,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
    )
