"""Builds csrc/ into pear_megatron._C: always the C++ ops, the CUDA ops where torch and nvcc have CUDA.

    pip install --no-build-isolation .            # build against the torch that is installed
    PEAR_MEGATRON_CUDA=0 pip install ...          # leave the CUDA ops out
    PEAR_MEGATRON_CUDA=1 pip install ...          # fail if they cannot be built

Set TORCH_CUDA_ARCH_LIST ("8.0;9.0") to choose architectures, MAX_JOBS to bound compiler processes.
A source distribution needs no torch; a wheel is for the torch release that it was built with, and says so.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
TOOLKIT = Path("/usr/local/cuda")

# torch takes the folder above the first nvcc on PATH for the toolkit, but that may be a wrapper script.
nvcc_on_path = Path(shutil.which("nvcc") or TOOLKIT / "bin" / "nvcc").resolve()
wrapped = not (nvcc_on_path.parent.parent / "include" / "cuda_runtime.h").exists()
if "CUDA_HOME" not in os.environ and wrapped and (TOOLKIT / "bin" / "nvcc").exists():
    os.environ["CUDA_HOME"] = str(TOOLKIT)

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    torch, why_no_torch, BuildExtension = None, error, build_ext
else:
    BuildExtension = cpp_extension.BuildExtension

# The ops load with the release of torch that they were compiled against; the others are pure Python.
DEPENDENCIES = [
    "megatron-core>=0.16",
    "psutil",  # mcore's dist_checkpointing imports it and does not declare it
    "packaging",
    "numpy",
    "pydantic>=2.7",
    "omegaconf>=2.3",
    "hydra-core>=1.3",
    "pyarrow>=15",
    "typer>=0.20",
    "rich>=13",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
]


def torch_requirement() -> str:
    """Of a source distribution any torch that can build it; of what is built, the release it is built against."""
    if not {"dist_info", "bdist_wheel", "editable_wheel"} & set(sys.argv):
        return "torch>=2.6"
    check_torch()  # before pip has anything else to show
    return f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*"


def check_torch() -> None:
    """Ends the build where there is no torch to build against, or another than the one that is to load the ops."""
    if torch is None:
        raise SystemExit(
            f"error: pear-megatron compiles its ops against torch, and {sys.executable} cannot import it "
            f"({why_no_torch}); install torch first, then run: pip install --no-build-isolation ."
        )
    for kind in ("purelib", "platlib"):  # of the environment, also where pip builds in isolation from it
        installed = Path(sysconfig.get_path(kind)) / "torch" / "version.py"
        found = re.search(r"__version__ = '(.+)'", installed.read_text()) if installed.exists() else None
        if found and found[1] != torch.__version__:
            raise SystemExit(
                f"error: pip builds in isolation against torch {torch.__version__}, and this environment has torch "
                f"{found[1]}, with which the ops would not load; run: pip install --no-build-isolation ."
            )


def why_no_cuda() -> str | None:
    """Why csrc/cuda is left out; None = it is built. PEAR_MEGATRON_CUDA decides, or what is installed."""
    wanted = os.environ.get("PEAR_MEGATRON_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"PEAR_MEGATRON_CUDA={wanted!r}: expected 0, 1 or unset")
    home = cpp_extension.CUDA_HOME
    nvcc = home is not None and (Path(home) / "bin" / "nvcc").exists()
    if wanted == "0":
        return "PEAR_MEGATRON_CUDA is 0"
    if torch.version.cuda is not None and nvcc:
        return None
    if wanted == "1":
        where = f"in {home}" if nvcc else "not found"
        raise SystemExit(
            f"PEAR_MEGATRON_CUDA=1, but the CUDA ops cannot be built: torch {torch.__version__} has CUDA "
            f"{torch.version.cuda}, nvcc is {where}. Install a CUDA build of torch and set CUDA_HOME."
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return f"torch has CUDA {torch.version.cuda}, but there is no nvcc; install that CUDA toolkit and set CUDA_HOME"


def sources(folder: str, pattern: str) -> list[str]:
    """Files of csrc/folder, relative to this one, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(pattern))


# A100, H100, B200 and RTX PRO 6000: machine code for each; other newer cards compile the PTX for themselves.
CARDS = {"sm_80": "8.0", "sm_90": "9.0+PTX", "sm_100": "10.0", "sm_120": "12.0"}


def default_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST where none is given: those of CARDS that nvcc knows."""
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True
    ).stdout.split()
    return ";".join(name for code, name in CARDS.items() if code in known)


def architectures() -> list[str]:
    """What nvcc compiles for, by torch's reading of TORCH_CUDA_ARCH_LIST: sm_80, sm_90, ..., compute_90 (PTX)."""
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures()
    found = re.findall(r",code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags()))
    return sorted(found, key=lambda name: name.startswith("compute"))


def extension() -> Extension:
    """The one extension module."""
    files = ["csrc/bindings.cpp", *sources("cpu", "*.cpp")]
    if torch is None:
        return Extension("pear_megatron._C", files)
    cuda = why_no_cuda() is None
    cxx = [
        "-O3",
        "-g0",
        "-std=c++20",
        "-fopenmp",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
        "-ffp-contract=fast",
        f"-DPEAR_TORCH_VERSION={torch.__version__}",
        f"-DPEAR_CUDA_VERSION={torch.version.cuda if cuda else ''}",
        f"-DPEAR_CUDA_ARCHITECTURES={','.join(architectures()) if cuda else ''}",
    ]
    headers = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[hi]*")]
    common = {"include_dirs": [str(ROOT / "csrc")], "extra_link_args": ["-fopenmp"], "depends": headers}
    if not cuda:
        return cpp_extension.CppExtension(
            "pear_megatron._C", files, extra_compile_args={"cxx": cxx}, **common
        )
    nvcc = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-Xptxas=-v"]
    return cpp_extension.CUDAExtension(
        "pear_megatron._C",
        files + sources("cuda", "*.cu") + sources("cuda", "*.cpp"),
        extra_compile_args={"cxx": [*cxx, "-DPEAR_MEGATRON_CUDA"], "nvcc": nvcc},
        **common,
    )


class Build(BuildExtension):
    """Ends by saying which ops there are; keeps nvcc's registers and spills in build/ptxas.log (tests/cuda_build)."""

    def run(self) -> None:
        """Checks, builds, and says what was built."""
        check_torch()
        super().run()
        reason = why_no_cuda()
        built = f"yes ({', '.join(architectures())})" if reason is None else f"no, because {reason}"
        print(f"CUDA ops: {built}", flush=True)

    def build_extensions(self) -> None:
        """Compiles, with the output copied to the log where nvcc is at work."""
        if why_no_cuda() is not None:
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


class PackageFiles(build_py):
    """Puts recipes/ and slurm/ into the package, as _recipes and _slurm; an editable install reads the checkout's."""

    def run(self) -> None:
        """Copies them beside the modules."""
        super().run()
        if self.editable_mode:
            return
        for folder in ("recipes", "slurm"):
            target = Path(self.build_lib, "pear_megatron", f"_{folder}")
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))


setup(
    install_requires=[torch_requirement(), *DEPENDENCIES],
    ext_modules=[extension()],
    cmdclass={"build_ext": Build, "build_py": PackageFiles},
)
