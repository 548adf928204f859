"""examine: everything that the doctor looks at, in the order in which it is read."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pear_megatron
from pear_megatron.doctor.finding import Finding
from pear_megatron.doctor.ops import Build, Gpu, driver_gpus, examine_build, examine_gpus
from pear_megatron.doctor.packages import (
    DISTRIBUTION,
    declared,
    declared_extras,
    examine_extras,
    examine_packages,
    installed,
)
from pear_megatron.errors import one_sentence


def examine() -> list[Finding]:
    """The whole report. What cannot be imported is a finding, not an error."""
    requirements = declared()
    packages, extras = examine_packages(requirements), examine_extras(requirements, declared_extras())
    system = [
        Finding(
            "system", DISTRIBUTION, f"{pear_megatron.__version__} in {Path(pear_megatron.__file__).parent}"
        ),
        Finding("system", "Python", f"{platform.python_version()} in {sys.executable}"),
        Finding("system", "platform", f"{platform.platform()}, {os.cpu_count()} CPUs"),
    ]
    if checkout := os.environ.get("NEMO_RL_DIR"):
        system.append(Finding("system", "NEMO_RL_DIR", checkout))
    if (recorded := installed(DISTRIBUTION)) != pear_megatron.__version__:
        state = f"pip has installed {recorded}" if recorded else "not installed"
        system[0] = Finding("system", DISTRIBUTION, f"{system[0].value} ({state})")
    if any(
        package.name in ("torch", "megatron-core") and package.value == "not installed"
        for package in packages
    ):
        return [*system, *packages, *extras]
    return [*system, *_torch(), *packages, *_ops(), *_used(), *extras]


def _gpus() -> list[Gpu]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [Gpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]


def _torch() -> list[Finding]:
    import torch

    threads = f"{torch.get_num_threads()} (OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')})"
    return [
        Finding("system", "CUDA of torch", torch.version.cuda or "none"),
        examine_gpus(_gpus(), driver_gpus(), torch.version.cuda),
        Finding("system", "torch's threads", threads),
    ]


def _ops() -> list[Finding]:
    try:
        from pear_megatron.ops import library
    except ImportError as error:
        return [Finding("ops", "extension", "cannot be loaded", str(error))]
    import torch

    build = Build(
        library.built_for_torch,
        library.built_for_cuda,
        library.cuda_architectures,
        torch.__version__,
        torch.version.cuda,
    )
    return [
        Finding("ops", "extension", str(library._C.__file__)),
        *examine_build(build, _gpus(), driver_gpus()),
        Finding("ops", "CPU instruction set", library.cpu_instruction_set),
    ]


def _used() -> list[Finding]:
    """What a run in bfloat16 with train.attention=auto comes to here."""
    section = "a run here uses"
    try:
        import torch

        from pear_megatron.megatron.attention import attention_path, transformer_engine_available
        from pear_megatron.megatron.fusions import has_fused_rotary, has_fused_weight_gradient
        from pear_megatron.recipe import TrainConfig

        path = attention_path(TrainConfig(global_batch_size=1, micro_batch_size=1, precision="bf16"))
        on_gpu = torch.cuda.is_available()
        fused = {
            "fused rotary embedding": (has_fused_rotary(), "Transformer Engine"),
            "fused weight gradient": (has_fused_weight_gradient(), "Apex"),
        }
    except ImportError as error:
        return [Finding(section, "Megatron-Core", "cannot be imported", one_sentence(error))]
    fault = None
    if on_gpu and installed("transformer-engine") and not transformer_engine_available():
        fault = "transformer-engine is installed and Megatron-Core cannot use it; `import transformer_engine` says why"
    found = [
        Finding(section, "device", "GPU" if on_gpu else "CPU (for tests and small runs)"),
        Finding(section, "attention", f"{path} (train.attention=auto, bf16)", fault),
    ]
    for name, (there, package) in fused.items():
        used = "yes" if there and on_gpu else f"no: {'needs a GPU' if not on_gpu else f'needs {package}'}"
        found.append(Finding(section, name, used))
    return found
