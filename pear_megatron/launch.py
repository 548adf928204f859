"""Starting a command on several ranks of this machine, unless torchrun or Slurm started it so already."""

from __future__ import annotations

import os
import sys

from pear_megatron.errors import PearError


def ensure_ranks(ranks: int) -> None:
    """Makes sure that this command runs on ``ranks`` ranks: starts itself again under torchrun if need be.

    With one rank, or inside a torchrun world of that size, returns. Otherwise replaces this process (its
    exit code is the ranks' own); call it before anything expensive, and before torch is initialised.

    Raises:
        PearError: the command runs under torchrun with another number of processes.
    """
    world = os.environ.get("WORLD_SIZE")
    if world is not None:
        if int(world) != ranks:
            raise PearError(
                f"torchrun started {world} process(es) and the command asks for {ranks} (tensor x pipeline "
                "parallel size); start it with as many, or without torchrun"
            )
        return
    if ranks == 1:
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    os.execv(
        sys.executable, [sys.executable, *torchrun, "-m", "pear_megatron.cli", *sys.argv[1:]]
    )  # fmt: skip


def is_main() -> bool:
    """Whether this process prints and writes: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"
