"""Another stack's program on some ranks, as its users start it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def torchrun(
    ranks: int, module: str, arguments: Sequence[str], *, folder: Path, checkout: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """``module`` in ``folder`` on some ranks, with this repository and a checkout to import; both outputs are one."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    paths = [str(REPOSITORY), checkout, os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [*command, f"--nproc-per-node={ranks}", "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": ":".join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )
