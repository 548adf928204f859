"""The doctor's verdicts on a build, for machines that are not here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pear_megatron.doctor.finding import Finding
from pear_megatron.doctor.ops import Build, Gpu, examine_build, examine_gpus, runs_on

A100, H100, B200, L40 = (
    Gpu("A100", (8, 0)),
    Gpu("H100", (9, 0)),
    Gpu("B200", (10, 0)),
    Gpu("L40", (8, 9)),
)
CUDA = Build("2.11.0", "13.0", ("sm_80", "sm_90", "compute_90"), "2.11.0", "13.0")
CPU = Build("2.13.0+cpu", "", (), "2.13.0+cpu", None)


def faults(found: list[Finding]) -> str:
    return "; ".join(finding.fault for finding in found if finding.fault)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("sm_80",), (8, 0), True),
        (("sm_80",), (8, 9), True),  # of the same generation
        (("sm_89",), (8, 0), False),
        (("sm_80", "sm_90"), (10, 0), False),
        (("sm_90", "compute_90"), (10, 0), True),  # the driver compiles PTX
        (("compute_90",), (8, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_90a", "compute_90a"), (10, 0), False),
        (("sm_120",), (12, 0), True),
        ((), (9, 0), False),
    ],
)
def test_what_code_runs_on_which_gpu(
    architectures: tuple[str, ...], capability: tuple[int, int], runs: bool
) -> None:
    assert runs_on(architectures, capability) == runs


@pytest.mark.parametrize("gpus", [[], [A100], [H100, H100], [B200], [L40]])
def test_a_build_that_fits_has_no_fault(gpus: list[Gpu]) -> None:
    assert faults(examine_build(CUDA, gpus, len(gpus))) == ""


def test_no_gpu_and_no_cuda_ops_is_no_fault() -> None:
    assert faults(examine_build(CPU, [], 0)) == ""


@pytest.mark.parametrize(
    ("build", "gpus", "driver", "said"),
    [
        (
            replace(CUDA, architectures=("sm_80",)),
            [A100, H100],
            2,
            "TORCH_CUDA_ARCH_LIST=9.0 PEAR_MEGATRON_CUDA=1",
        ),
        (replace(CUDA, architectures=(), built_for_cuda=""), [H100], 1, "built without CUDA"),
        (CPU, [], 8, "there are 8 NVIDIA GPUs here, and torch 2.13.0+cpu is a build without CUDA"),
        (replace(CUDA, torch_cuda="12.8"), [], 0, "built with CUDA 13.0, and torch here has CUDA 12.8"),
        (replace(CUDA, torch_cuda=None), [], 0, "torch here has CUDA None"),
    ],
)
def test_a_mismatch_is_a_fault_with_its_remedy(build: Build, gpus: list[Gpu], driver: int, said: str) -> None:
    found = faults(examine_build(build, gpus, driver))
    assert said in found
    assert "install" in found


def test_gpus_that_torch_cannot_use_are_a_fault_and_like_ones_are_counted() -> None:
    assert "CUDA_VISIBLE_DEVICES" in str(examine_gpus([], 4, "13.0").fault)
    assert examine_gpus([H100, H100, A100], 3, "13.0") == Finding(
        "system", "GPUs", "2 x H100 (9.0), 1 x A100 (8.0)"
    )
