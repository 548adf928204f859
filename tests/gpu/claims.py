"""The tests of the ops, the weights and the loss, to be run again with other kernels beneath."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests import test_kl_loss, test_loss, test_weights
from tests.distributed import run_ranks
from tests.ops import (
    test_logprob,
    test_logprob_tensor_parallel,
    test_output_layer,
    test_registration,
    test_statistics,
    test_suffix_sum,
)

MODULES = (
    test_logprob,
    test_logprob_tensor_parallel,
    test_output_layer,
    test_registration,
    test_statistics,
    test_suffix_sum,
    test_weights,
    test_loss,
    test_kl_loss,
)

# What holds on the host alone, and why.
HOST_ONLY = {
    "logprob: a_target_outside_the_vocabulary_names_token_and_value": "a device-side assertion",
    "logprob: nothing_the_size_of_the_logits_is_allocated_but_an_asked_for_gradient": "asks the CPU's profiler",
    "logprob: rows_off_the_mask_are_zero_whatever_they_hold": "compares bits of rows aligned differently",
    "logprob: the_kernels_of_every_instruction_set_equal_float64": "the host's kernels",
    "logprob: wrong_shapes_and_dtypes_are_named": "tensors made on the host, when the module is read",
    "logprob_tensor_parallel: a_target_outside_the_vocabulary_raises_on_every_rank_and_none_hangs": (
        "a device-side assertion"
    ),
    "output_layer: inputs_that_do_not_fit_are_named": "tensors made on the host, when the module is read",
    "output_layer: nothing_the_size_of_all_logits_is_allocated": "asks the CPU's profiler",
    "registration: the_number_of_threads_changes_no_bit": "the host's threads",
    "statistics: a_top_k_that_is_none_is_refused_with_its_place": "a device-side assertion",
    "statistics: arguments_that_do_not_fit_are_named": "tensors made on the host, when the module is read",
    "statistics: nothing_the_size_of_the_logits_is_allocated": "asks the CPU's profiler",
    "suffix_sum: bad_boundaries_are_refused": "a device-side assertion",
    "suffix_sum: bad_values_are_refused": "tensors made on the host, when the module is read",
    "suffix_sum: packs_that_ranks_cannot_share_are_refused_on_every_rank": "checked where it costs no sync",
    "weights: inputs_that_do_not_fit_are_named": "tensors made on the host, when the module is read",
    "weights: a_behaviour_logprob_that_is_none_is_refused_with_its_place": "a device-side assertion",
    "weights: lengths_that_ranks_cannot_share_are_refused_on_every_rank": "checked where it costs no sync",
    "loss: inputs_that_do_not_fit_are_named": "tensors made on the host, when the module is read",
    "loss: bad_behaviour_logprobs_are_no_nan_loss_but_an_error": "a device-side assertion",
    "loss: what_is_no_tensor_no_config_or_elsewhere_is_named": "tensors made on the host, when the module is read",
    "loss: token_weights_that_are_not_finite_on_a_decision_are_refused": "a device-side assertion",
}


def claims(*, without: tuple[ModuleType, ...] = (), ranks: bool = True) -> dict[str, Callable[..., None]]:
    """Test functions by new, unique names, for a module's globals().

    Args:
        without: modules to leave out.
        ranks: with those that spawn ranks.
    """
    found = {}
    for module in MODULES:
        subject = module.__name__.rsplit("test_", 1)[1]
        for name, function in vars(module).items():
            claim = name.removeprefix("test_")
            if module in without or claim == name or not callable(function):
                continue
            if f"{subject}: {claim}" in HOST_ONLY or (
                not ranks and "run_ranks" in function.__code__.co_names
            ):
                continue
            found[f"test_{subject}__{claim}"] = function
    return found


def to(device: str, x: Any) -> Any:
    """Tensors, and those in lists, dicts and dataclasses, on another device."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.replace(
            x, **{f.name: to(device, getattr(x, f.name)) for f in dataclasses.fields(x)}
        )

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().to(device)
        return to(device, leaf) if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) else leaf

    return tree_map(move, x)


def _on_device(rank: int, device: str, function: Callable[..., Any], *args: Any) -> Any:
    with torch.device(device):
        return function(rank, *(to(device, x) for x in args))


class RanksOn:
    """run_ranks with every rank's tensors on a device: two ranks on one card, over gloo."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        args = tuple(to("cpu", x) for x in args)
        results = run_ranks(
            world_size, _on_device, self.device, function, *args, device=self.device, **kwargs
        )
        return to(self.device, results)
