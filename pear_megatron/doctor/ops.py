"""The compiled ops: what they were built against and for, against the torch and the GPUs that are here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pear_megatron.doctor.finding import Finding

_WITH_CUDA = "PEAR_MEGATRON_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use.

    Attributes:
        capability: its compute capability, (9, 0) of an H100.
    """

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Build:
    """What the extension says of itself, and the torch that it was loaded into.

    Attributes:
        built_for_torch, built_for_cuda: versions at the build; CUDA's is empty without CUDA ops.
        architectures: ``sm_90`` (machine code), ``compute_90`` (PTX).
        torch, torch_cuda: versions here; CUDA's is None of a CPU build of torch.
    """

    built_for_torch: str
    built_for_cuda: str
    architectures: tuple[str, ...]
    torch: str
    torch_cuda: str | None


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU: machine code of its generation, or older PTX."""
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
        if found is None:
            continue
        kind, built = found[1], (int(found[2]), int(found[3]))
        if found[4]:  # sm_90a: for that GPU alone
            runs = built == capability
        else:
            runs = built <= capability and (kind == "compute" or built[0] == capability[0])
        if runs:
            return True
    return False


def examine_build(build: Build, gpus: Sequence[Gpu], driver_gpus: int) -> list[Finding]:
    """The build against torch's CUDA and against each GPU; another release of torch would not have loaded it.

    Args:
        gpus: that torch sees.
        driver_gpus: that NVIDIA's driver has, whether torch sees them or not.
    """
    found = [Finding("ops", "built against torch", build.built_for_torch)]
    if not build.architectures:
        fault = f"the ops were built without CUDA; build them again: {_WITH_CUDA}" if gpus else None
        if not gpus and driver_gpus and build.torch_cuda is None:
            fault = (
                f"{_gpus(driver_gpus)} here, and torch {build.torch} is a build without CUDA; install one with CUDA "
                f"(https://pytorch.org/get-started), then build the ops: {_WITH_CUDA}"
            )
        return [*found, Finding("ops", "CUDA ops", "no", fault)]
    faults = []
    if build.torch_cuda is None or build.built_for_cuda.split(".")[0] != build.torch_cuda.split(".")[0]:
        faults.append(
            f"the CUDA ops were built with CUDA {build.built_for_cuda}, and torch here has CUDA {build.torch_cuda}; "
            f"build them again: {_WITH_CUDA}"
        )
    for gpu in dict.fromkeys(gpus):
        if not runs_on(build.architectures, gpu.capability):
            capability = "{}.{}".format(*gpu.capability)
            faults.append(
                f"the CUDA ops were built for {', '.join(build.architectures)}, and {gpu.name} has compute capability "
                f"{capability}; build them again: TORCH_CUDA_ARCH_LIST={capability} {_WITH_CUDA}"
            )
    value = f"yes ({', '.join(build.architectures)}), CUDA {build.built_for_cuda}"
    return [*found, Finding("ops", "CUDA ops", value, "; ".join(faults) or None)]


def examine_gpus(gpus: Sequence[Gpu], driver_gpus: int, torch_cuda: str | None) -> Finding:
    """The GPUs; at fault where the driver has some and a torch with CUDA cannot use them."""
    if gpus:
        counted = Counter(f"{gpu.name} ({gpu.capability[0]}.{gpu.capability[1]})" for gpu in gpus)
        return Finding("system", "GPUs", ", ".join(f"{count} x {name}" for name, count in counted.items()))
    if driver_gpus and torch_cuda is not None:
        fault = (
            f"{_gpus(driver_gpus)} here, and torch (CUDA {torch_cuda}) can use none; see CUDA_VISIBLE_DEVICES, and "
            "whether the driver is new enough for that CUDA: nvidia-smi"
        )
        return Finding("system", "GPUs", "none that torch can use", fault)
    return Finding("system", "GPUs", f"{driver_gpus} not used" if driver_gpus else "none")


def _gpus(count: int) -> str:
    return "there is 1 NVIDIA GPU" if count == 1 else f"there are {count} NVIDIA GPUs"


def driver_gpus() -> int:
    """GPUs that NVIDIA's driver has on this machine."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
