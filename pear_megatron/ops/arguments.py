"""What a caller may give for a tensor or a configuration, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pear_megatron.config import PearConfig


def require_tensors(device: torch.device | None = None, /, **values: Any) -> None:
    """Every value, under its parameter's name, must be a tensor, and on ``device`` where one is given.

    Raises:
        TypeError: a list, an array or anything else that is no tensor.
        ValueError: a tensor on another device.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(value).__name__}; give torch.as_tensor({name})"
            )
        if device is not None and value.device != device:
            raise ValueError(
                f"{name} is on {value.device} and the log-probs or logits are on {device}; give "
                f"{name}.to({str(device)!r})"
            )


def require_mask(mask: Any, device: torch.device) -> None:
    """``mask`` must be a bool tensor on ``device``.

    Raises:
        TypeError, ValueError: as require_tensors; another dtype.
    """
    require_tensors(device, mask=mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True on decisions), got {mask.dtype}; give mask.bool()")


def require_behavior(behavior_logprobs: Any, device: torch.device, config: PearConfig) -> None:
    """``behavior_logprobs`` must be float32 or float64 constants on ``device``, or None with ``variant: none``.

    Raises:
        TypeError, ValueError: as require_tensors; None, another dtype, or a tensor that requires a gradient.
    """
    if behavior_logprobs is None:
        if config.variant != "none":
            raise ValueError(f"variant {config.variant!r} needs behavior_logprobs; only 'none' does without")
        return
    require_tensors(device, behavior_logprobs=behavior_logprobs)
    dtype = behavior_logprobs.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"behavior_logprobs are {str(dtype).removeprefix('torch.')}, which is too coarse for ratios clipped "
            "at -0.08 and 0.3; store them as float32"
        )
    if behavior_logprobs.requires_grad:
        raise ValueError(
            "behavior_logprobs require a gradient, but the behaviour policy is fixed: they are what the data "
            "recorded, not the model's own log-probs; if they are right, give behavior_logprobs.detach()"
        )


def require_config(config: Any) -> None:
    """``config`` must be a PearConfig.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(config, PearConfig):
        way_out = "pass PearConfig(**config)" if isinstance(config, Mapping) else "pass PearConfig(...)"
        raise TypeError(f"config must be a PearConfig, got {type(config).__name__}; {way_out}")
