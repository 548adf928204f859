"""A rank of verl on CPU: its platform interface answered for a machine without a GPU; then the program that is named.

    python -m tests.adapters.verl_cpu MODULE [hydra overrides]

verl has no CPU platform of its own; hardware vendors give it one through this interface.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
import types
from typing import Any

import torch


def install() -> None:
    """Makes verl run on CPU tensors and gloo. Call it before anything of verl is imported but its plugin module."""
    import os

    os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # which engine classes: those that are registered for GPUs
    from verl.plugin.platform import platform_manager
    from verl.plugin.platform.platform_base import PlatformBase

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    module = types.ModuleType("cpu_device")
    for name in ("set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all"):
        setattr(module, name, nothing)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *args, **kwargs: 0)
    vars(module).update(
        is_available=lambda: False,
        current_device=lambda: torch.device("cpu"),
        device_count=lambda: 1,
        get_device_name=lambda *args: "H100",
        mem_get_info=lambda *args: (1 << 34, 1 << 34),
        reset_peak_memory_stats=nothing,
        ipc_collect=nothing,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
    )

    class Cpu(PlatformBase):
        device_name = "cpu"
        vendor_name = "cpu"
        device_module = module
        is_available = is_ipc_supported = lambda self: False
        current_device = lambda self: torch.device("cpu")  # noqa: E731
        device_count = lambda self: 1  # noqa: E731
        get_device_capability = lambda self, device_index=0: (None, None)  # noqa: E731
        communication_backend_name = lambda self: "gloo"  # noqa: E731
        visible_devices_envvar = lambda self: "CPU_VISIBLE_DEVICES"  # noqa: E731
        nvtx_range = lambda self, msg: contextlib.nullcontext()  # noqa: E731
        ray_resource_name = lambda self: "CPU"  # noqa: E731
        ray_noset_envvars = lambda self: []  # noqa: E731
        set_device = synchronize = manual_seed = manual_seed_all = nothing
        set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = nothing

    platform_manager.set_platform(Cpu())
    from verl.utils import import_utils

    import_utils.is_trl_available = lambda: False  # verl wants trl 0.9; the one that is here may be ours


if __name__ == "__main__":
    program, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    if "engine=megatron" in sys.argv:
        from pear_megatron.megatron import cpu
        from tests.adapters import verl_bridge

        cpu.enable()
        verl_bridge.install()
    install()
    runpy.run_module(program, run_name="__main__", alter_sys=True)
