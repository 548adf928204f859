"""What a caller may give for a tensor or a configuration, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pear_megatron.config import PearConfig

# What rounding leaves of log 1 above 0, as in csrc/weights_math.h.
POSITIVE_TOLERANCE = 1e-5
# Below it no token was ever sampled: engines write -9999 where they have no log-probability. As there, too.
LEAST_LOGPROB = -1000.0


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
        if hasattr(value, "to_local"):
            raise TypeError(
                f"{name} is a DTensor, whose parts the ops do not know; give {name}.to_local(), with tp_group where "
                f"the vocabulary is split, or {name}.full_tensor()"
            )
        if device is not None and value.device != device:
            raise ValueError(
                f"{name} is on {value.device} and the log-probs or logits are on {device}; give "
                f"{name}.to({str(device)!r})"
            )


def require_target(target: Any, device: torch.device) -> None:
    """``target`` must be an int64 tensor on ``device``.

    Raises:
        TypeError, ValueError: as require_tensors; another dtype.
    """
    require_tensors(device, target=target)
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}; give target.long()")


def require_mask(mask: Any, device: torch.device) -> None:
    """``mask`` must be a bool tensor on ``device``.

    Raises:
        TypeError, ValueError: as require_tensors; another dtype.
    """
    require_tensors(device, mask=mask)
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool (True on decisions), got {mask.dtype}; give mask.bool(), and weights of tokens as "
            "token_weights"
        )


def require_behavior(
    behavior_logprobs: Any,
    device: torch.device,
    config: PearConfig,
    *,
    reference_logprobs: Any = None,
    has_reward: bool = False,
) -> None:
    """The data's log-probs must be float32 or float64 constants on ``device``, or None where nothing needs them.

    ``ratio`` says which of the two the weights need, ``variant: none`` needs none, and ``dft_policy`` may ask for the
    reference. ``negative_floor`` needs either of them where there are rewards.

    Raises:
        TypeError, ValueError: as require_tensors; None, another dtype, or a tensor that requires a gradient.
    """
    if config.needs_reference and reference_logprobs is None:
        name, otherwise = ("ratio", "behavior") if config.ratio == "reference" else ("dft_policy", "target")
        raise ValueError(
            f"{name} 'reference' needs reference_logprobs, the initial model's log-probs of the same tokens "
            f"(`pear-megatron score --as reference`); {name} {otherwise!r} does without"
        )
    if config.variant != "none" and config.ratio == "behavior" and behavior_logprobs is None:
        raise ValueError(f"variant {config.variant!r} needs behavior_logprobs; only 'none' does without")
    if config.negative_floor is not None and has_reward and behavior_logprobs is reference_logprobs is None:
        raise ValueError(
            f"negative_floor {config.negative_floor:g} needs to know where a negative example's log-probs began: "
            "give reference_logprobs or behavior_logprobs, or leave negative_floor out"
        )
    for name, x, whose in (
        ("behavior_logprobs", behavior_logprobs, "the behaviour policy"),
        ("reference_logprobs", reference_logprobs, "the initial model"),
    ):
        if x is not None:
            _require_logprobs(name, x, device, whose)


def require_alike(mask: Tensor, **values: Tensor | None) -> None:
    """What has a number per token must be [T], or laid out as a mask in rows is; None is let through.

    Raises:
        ValueError: rows of another layout, [S, B] beside [B, S], which would be read as other tokens.
    """
    for name, x in values.items():
        if x is not None and mask.dim() > 1 < x.dim() and x.shape != mask.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and mask {tuple(mask.shape)}; give one number per token, aligned "
                "with target"
            )


def require_everywhere(good: Tensor, name: str, otherwise: str) -> None:
    """``good`` must be True everywhere; ``otherwise`` says what ``name`` is where it is not.

    Raises:
        ValueError: it is not; on CUDA a device-side assertion, without waiting for the device.
    """
    if good.is_cuda:
        torch._assert_async(good.all(), f"{name}: {otherwise}")
    elif not torch.compiler.is_compiling() and not good.all():
        raise ValueError(f"{name}: {otherwise} ({int((~good).sum())} of {good.numel()})")


def require_fine(name: str, logprobs: Tensor) -> None:
    """Log-probs must be float32 or float64.

    Raises:
        ValueError: another dtype.
    """
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} are {str(logprobs.dtype).removeprefix('torch.')}, which is too coarse for ratios clipped "
            "at -0.08 and 0.3; compute and store them as float32"
        )


def require_constants(**tensors: Any) -> None:
    """What the loss is multiplied by is no part of the model.

    Raises:
        ValueError: a tensor that requires a gradient.
    """
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient: the loss has none for it; give {name}.detach()"
            )


def _require_logprobs(name: str, logprobs: Any, device: torch.device, whose: str) -> None:
    require_tensors(device, **{name: logprobs})
    require_fine(name, logprobs)
    if logprobs.requires_grad:
        raise ValueError(
            f"{name} require a gradient, but {whose} is fixed: they are what the data "
            f"recorded, not the model's own log-probs; if they are right, give {name}.detach()"
        )


def require_sampled(name: str, logprobs: Tensor, mask: Tensor) -> None:
    """``logprobs`` [T] must be log-probabilities on the decisions: finite, and at most 0 but for rounding.

    Raises:
        ValueError: they are not; on CUDA a device-side assertion.
    """
    good = ((logprobs >= LEAST_LOGPROB) & (logprobs <= POSITIVE_TOLERANCE)) | ~mask
    if good.is_cuda:  # without waiting for the device
        torch._assert_async(good.all(), f"{name} are NaN, infinite, below -1000 or positive on a decision")
    elif not torch.compiler.is_compiling() and not good.all():
        bad = (~good).nonzero().flatten()
        raise ValueError(
            f"{name} are no log-probabilities on {len(bad)} of {int(mask.sum())} decisions, first at token {bad[0]} of "
            f"the pack: {logprobs[bad[0]]:g}; score the trajectory again, or take such tokens off the mask"
        )


def require_config(config: Any) -> None:
    """``config`` must be a PearConfig.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(config, PearConfig):
        way_out = "pass PearConfig(**config)" if isinstance(config, Mapping) else "pass PearConfig(...)"
        raise TypeError(f"config must be a PearConfig, got {type(config).__name__}; {way_out}")
