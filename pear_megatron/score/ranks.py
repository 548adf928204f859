"""Ranks: the processes of one `score` command, and the few words they exchange."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from pear_megatron.ranks import from_main, patient_group

_T = TypeVar("_T")


def world_size() -> int:
    """Processes that torchrun started, or that torch.distributed knows."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


class Ranks:
    """The torchrun world that this process is in, or a world of one.

    Joins torch.distributed with the backend that Megatron takes (NCCL on GPUs, gloo without), and a second
    group over gloo to wait in, since NCCL gives up after minutes. Use as a context manager: leaves what it,
    or the model inside it, has joined.
    """

    def __init__(self) -> None:
        self._guest = torch.distributed.is_initialized()
        self.size = world_size()
        self._waiting: Any = None

    def __enter__(self) -> Self:
        if self.size > 1:
            on_gpu = torch.cuda.is_available()
            if on_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            if not self._guest:
                torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
            self._waiting = patient_group()  # for rank 0's tokenising, or for a slower replica
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the other ranks may still be at work: no goodbye, torchrun ends them.
        if self._guest or (kind is not None and self.size > 1) or not torch.distributed.is_initialized():
            return
        if "megatron.core.parallel_state" in sys.modules:
            from pear_megatron.megatron.layout import shutdown

            shutdown()
        else:
            torch.distributed.destroy_process_group()

    def from_main(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns on rank 0, on every rank; a PearError there is one everywhere."""
        return from_main(work, group=self._waiting)

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        if self.size > 1:
            torch.distributed.barrier(group=self._waiting)
