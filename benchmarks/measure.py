"""Timing, memory and the record of a run, for every benchmark here."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
PACKAGES = ("torch", "megatron-core", "transformer-engine", "liger-kernel", "quack-kernels", "triton")


def time_ms(
    device: torch.device, prepare: Callable[[], Any], run: Callable[[Any], Any], seconds: float
) -> float:
    """Milliseconds of ``run(prepare())``; prepare is not timed, and neither are two first runs.

    On a GPU the median; on a CPU, where others are at work too, the least processor time, over all threads.
    """
    samples: list[float] = []
    spent = 0.0
    while len(samples) < 5 or (spent < seconds and len(samples) < 200):
        state = prepare()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(state)
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end))
        else:
            begin = time.process_time()
            run(state)
            samples.append(1e3 * (time.process_time() - begin))
        spent += samples[-1] / 1e3
    return statistics.median(samples[2:]) if device.type == "cuda" else min(samples[2:])


def peak_bytes(device: torch.device, run: Callable[[], Any]) -> int:
    """The most memory that was held at once during ``run``, beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a copy too large for any cache."""
    size = 2**31 if device.type == "cuda" else 2**28
    source = torch.randint(100, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * time_ms(device, lambda: None, lambda _: target.copy_(source), 0.5))


def hardware(device: torch.device) -> str:
    """The card, or the processor, its instructions and how many threads of it torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    threads = torch.get_num_threads()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads != 1)}"


def versions() -> dict[str, str]:
    """What is installed of ourselves and the peers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def save(name: str, device: torch.device, record: dict[str, Any]) -> Path:
    """Writes results/<name>-<device>.json with the machine, the versions and the command."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}-{device.type}.json"
    chosen = [f"{name}={os.environ[name]}" for name in ("ATEN_CPU_CAPABILITY",) if name in os.environ]
    command = shlex.join([*chosen, "python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    about = {"hardware": hardware(device), "versions": versions(), "command": command}
    path.write_text(json.dumps({**about, **record}, indent=1) + "\n")
    return path


def single_process_group(device: torch.device) -> None:
    """A world of one rank with Megatron's parallel state, as its ops need."""
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
