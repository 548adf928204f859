"""Builds csrc/ into pear_megatron._C: always the C++ ops, the CUDA ops where torch and nvcc have CUDA.

    pip install --no-build-isolation .            # build against the torch that is installed
    PEAR_MEGATRON_CUDA=0 pip install ...          # leave the CUDA ops out
    PEAR_MEGATRON_CUDA=1 pip install ...          # fail if they cannot be built

Set TORCH_CUDA_ARCH_LIST ("8.0;9.0") to choose architectures, MAX_JOBS to bound compiler processes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).parent.resolve()
TOOLKIT = Path("/usr/local/cuda")

# torch takes the folder above the first nvcc on PATH for the toolkit, but that may be a wrapper script.
nvcc_on_path = Path(shutil.which("nvcc") or TOOLKIT / "bin" / "nvcc").resolve()
wrapped = not (nvcc_on_path.parent.parent / "include" / "cuda_runtime.h").exists()
if "CUDA_HOME" not in os.environ and wrapped and (TOOLKIT / "bin" / "nvcc").exists():
    os.environ["CUDA_HOME"] = str(TOOLKIT)

from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def with_cuda() -> bool:
    """Whether to build csrc/cuda, from PEAR_MEGATRON_CUDA or from what is installed."""
    wanted = os.environ.get("PEAR_MEGATRON_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"PEAR_MEGATRON_CUDA={wanted!r}: expected 0, 1 or unset")
    nvcc = CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists()
    possible = torch.version.cuda is not None and nvcc and bool(sources("cuda", "*.cu"))
    if wanted == "1" and not possible:
        where = f"in {CUDA_HOME}" if nvcc else "not found"
        raise SystemExit(
            f"PEAR_MEGATRON_CUDA=1, but the CUDA ops cannot be built: torch {torch.__version__} has CUDA "
            f"{torch.version.cuda}, nvcc is {where}. Install a CUDA build of torch and set CUDA_HOME."
        )
    return possible and wanted != "0"


def sources(folder: str, pattern: str) -> list[str]:
    """Files of csrc/folder, relative to this one, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(pattern))


def extension() -> CppExtension:
    """The one extension module."""
    cxx = [
        "-O3",
        "-g0",
        "-std=c++20",
        "-fopenmp",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
        "-ffp-contract=fast",
    ]
    files = ["csrc/bindings.cpp", *sources("cpu", "*.cpp")]
    headers = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[hi]*")]
    common = {"include_dirs": [str(ROOT / "csrc")], "extra_link_args": ["-fopenmp"], "depends": headers}
    if not with_cuda():
        return CppExtension("pear_megatron._C", files, extra_compile_args={"cxx": cxx}, **common)
    # sm_80 and sm_90 machine code, and PTX that newer cards compile for themselves.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    nvcc = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-Xptxas=-v"]
    return CUDAExtension(
        "pear_megatron._C",
        files + sources("cuda", "*.cu") + sources("cuda", "*.cpp"),
        extra_compile_args={"cxx": [*cxx, "-DPEAR_MEGATRON_CUDA"], "nvcc": nvcc},
        **common,
    )


class Build(BuildExtension):
    """Also keeps what nvcc says of registers and spills, in build/ptxas.log (tests/cuda_build reads it)."""

    def build_extensions(self) -> None:
        """Compiles, with the output copied to the log where nvcc is at work."""
        if not with_cuda():
            return super().build_extensions()
        log = ROOT / "build" / "ptxas.log"
        log.parent.mkdir(exist_ok=True)
        stdout = os.dup(1)
        # Appended: ninja compiles only what has changed, and the last word on a kernel counts.
        with subprocess.Popen(["tee", "-a", str(log)], stdin=subprocess.PIPE) as tee:
            os.dup2(tee.stdin.fileno(), 1)
            try:
                super().build_extensions()
            finally:
                sys.stdout.flush()
                os.dup2(stdout, 1)
                tee.stdin.close()


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
