"""Megatron-Core without a GPU: the one place that makes it run on CPU and gloo.

mcore asks for CUDA by name: ``device="cuda"``, ``.cuda()``, ``torch.cuda.current_device()``, and checks
like ``param.type() == "torch.cuda.FloatTensor"``. Where torch has no CUDA these ask for the CPU instead,
so that its real layers, process groups, pipeline schedules, DDP, optimizers and checkpoints run, and
every layout can be tested on a laptop. On a machine with a GPU this module does nothing.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "as_tensor")
_enabled = False


def enable() -> bool:
    """Makes Megatron-Core run on CPU if torch has no CUDA. Call it before importing ``megatron``.

    Returns:
        True if this process runs Megatron-Core on CPU.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if not _enabled:
        _redirect_devices()
        _silence_streams()
        _answer_type_checks()
        with _without_compiler():
            _disable_cuda_rng()
            _let_norms_be_sequence_parallel()
            _exchange_tokens_over_gloo()
            _offload_within_the_host()
        _enabled = True
    return True


def enable_training() -> bool:
    """``enable``, and the same for ``megatron.training`` (in megatron-core's wheel from 0.19 on).

    Returns:
        True if this process runs Megatron-Core on CPU.
    """
    if not enable():
        return False
    from megatron.core.datasets import utils
    from megatron.training import initialize, training

    original = initialize.initialize_megatron

    def initialize_on_cpu(*args: Any, **kwargs: Any) -> Any:
        # It makes process groups only where it counts GPUs.
        count, torch.cuda.device_count = torch.cuda.device_count, lambda: 1
        try:
            return original(*args, allow_no_cuda=True, **kwargs)
        finally:
            torch.cuda.device_count = count

    training.initialize_megatron = initialize_on_cpu
    utils.compile_helpers = lambda: None  # of indexed data sets, which are not used
    return True


def _on_cpu(device: Any) -> Any:
    """The CPU where ``device`` means a CUDA device (a string, a torch.device, or an index)."""
    if device is None or (isinstance(device, str) and not device.startswith("cuda")):
        return device
    if isinstance(device, torch.device) and device.type != "cuda":
        return device
    return torch.device("cpu")


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """mcore wraps functions in torch.compile on import: seconds of start-up, and C++ compilation later."""
    original = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else lambda f: f  # type: ignore
    try:
        yield
    finally:
        torch.compile = original


def _redirect_devices() -> None:
    def wrap(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            if "pin_memory" in kwargs:
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return on_cpu

    # `with torch.device("meta")`, as transformers loads models, caches the functions that it redirects: torch's
    # own ones, if it is asked for them before they are wrapped here.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, wrap(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def _silence_streams() -> None:
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    class Stream:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            return None

        wait = wait_stream = wait_event = synchronize = record = nothing

        def record_event(self, *args: Any) -> Any:
            return self

    # A function of its own for each: torch.compile tells torch's functions apart by their identity.
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.Stream = torch.cuda.Event = Stream  # type: ignore
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *args, **kwargs: 0)
    torch.cuda.memory_stats = lambda *args, **kwargs: collections.defaultdict(int)  # type: ignore
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.get_device_properties = lambda *args, **kwargs: SimpleNamespace(  # type: ignore
        name="CPU", major=8, minor=0, total_memory=0
    )
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: Stream()  # type: ignore
    torch.cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()  # type: ignore
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = nothing
    torch.Tensor.record_stream = nothing  # type: ignore[method-assign]


def _answer_type_checks() -> None:
    """``tensor.type()`` says "torch.cuda.FloatTensor", which mcore's optimizers insist on."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if not args and not kwargs and isinstance(answer, str):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_name  # type: ignore[assignment]


class _CpuRngTracker:
    """Stands in for mcore's CUDA RNG tracker: one generator, no states to fork."""

    @contextlib.contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        yield

    def is_initialized(self) -> bool:
        return True

    def get_states(self) -> dict[str, Any]:
        return {"model-parallel-rng": torch.get_rng_state()}  # none would end Megatron-LM's resume

    def set_states(self, states: dict[str, Any]) -> None:
        return None

    def add(self, name: str, seed: int) -> None:
        return None

    def reset(self) -> None:
        return None


def _disable_cuda_rng() -> None:
    from megatron.core.tensor_parallel import random

    random._CUDA_RNG_STATE_TRACKER = _CpuRngTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    # Recomputed activations ask for the states before they are computed again.
    random._get_cuda_rng_state = lambda *args, **kwargs: None
    random._set_cuda_rng_state = lambda *args, **kwargs: None


def _let_norms_be_sequence_parallel() -> None:
    """torch's norms compute what Megatron's do; all they lack is the mark by which their gradients are summed up."""
    from megatron.core.transformer import torch_norm

    original = torch_norm.WrappedTorchNorm.__new__

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = original(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = build  # type: ignore[method-assign]


def _exchange_tokens_over_gloo() -> None:
    """Experts' tokens: split sizes as arrays, as from a GPU, and the collectives of uneven sizes that gloo has not."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    to_cpu = token_dispatcher.maybe_move_tensor_to_cpu
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.numpy()
        return to_cpu(tensor, as_numpy, record_stream)

    def gather_uneven(
        x: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(x, group, sizes, *args)
        longest = max(1, *sizes)
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: len(x)] = x
        pieces = gather(padded, group).split(longest)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    def reduce_scatter_uneven(
        x: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return reduce_scatter(x, group, sizes, *args)
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].clone()

    token_dispatcher.maybe_move_tensor_to_cpu = move
    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven


class _Offloaded(torch.Tensor):
    """A parameter's copy in what would be the host's memory."""


def _offload_within_the_host() -> None:
    """The optimizer that keeps a part of its state on the host asks its parameters whether they are on a GPU."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    share_out = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def share_out_as_from_gpu(self: Any, offload_fraction: float) -> Any:
        Tensor: Any = torch.Tensor
        original = Tensor.is_cuda, Tensor.pin_memory
        Tensor.is_cuda = property(lambda x: not isinstance(x, _Offloaded))
        Tensor.pin_memory = lambda x: x.as_subclass(_Offloaded)
        try:
            return share_out(self, offload_fraction)
        finally:
            Tensor.is_cuda, Tensor.pin_memory = original

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = share_out_as_from_gpu
