"""run_ranks: a test's function on every rank of a real process group.

    def sums_over_ranks(rank, x):
        torch.distributed.all_reduce(x)
        return x

    results = run_ranks(2, sums_over_ranks, torch.ones(3))  # one entry per rank

Ranks are processes of their own. They are forked from a server that has imported torch and Megatron-Core
once and run nothing with them, so that a group of ranks costs a fraction of a second, not an import.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

_FORKSERVER = multiprocessing.get_context("forkserver")
_IMPORTED_ONCE = ["torch", "torch.distributed", "pear_megatron"]
if not torch.cuda.is_available():  # with a GPU, Transformer Engine starts CUDA, which no fork survives
    _IMPORTED_ONCE.append("pear_megatron.compare.preload")
_FORKSERVER.set_forkserver_preload(_IMPORTED_ONCE)


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    device: str = "cpu",
    backend: str = "gloo",
    timeout: float = 600.0,
) -> list[Any]:
    """Runs ``function(rank, *args)`` on every rank of a new world and returns what each rank returned.

    The default process group of each rank is the world (``torch.distributed.group.WORLD``), with one
    CPU thread. With ``device="cuda"`` rank r's current device is r, modulo the number there is.

    Args:
        world_size: number of ranks.
        function: picklable, so defined at the top of a module.
        args: picklable; tensors are copied.
        device: ``cpu`` or ``cuda``.
        backend: of the process group; ``gloo`` takes CUDA tensors too.
        timeout: seconds for the whole run, collectives included.

    Raises:
        Exception: the first exception that a rank raised, of its own type, with the rank's traceback
            as a note. The other ranks are stopped.
        TimeoutError: the ranks did not finish.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        torch.save((function, args, device, backend, timeout), Path(folder) / "task.pt")
        processes = [  # no daemons: those may start no processes, and saving a checkpoint does
            _FORKSERVER.Process(target=_run_rank, args=(rank, world_size, folder))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [_load(_file(folder, rank, "result")) for rank in range(world_size)]


def zigzag(x: torch.Tensor, cu_seqlens: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A context-parallel rank's tokens: chunks r and 2n-1-r of the 2n of every segment, joined."""
    shard = []
    for segment in x.tensor_split(cu_seqlens[1:-1].tolist()):
        chunks = segment.chunk(2 * ranks)
        shard += [chunks[rank], chunks[2 * ranks - 1 - rank]]
    return torch.cat(shard)


def _run_rank(rank: int, world_size: int, folder: str) -> None:
    try:
        function, args, device, backend, timeout = _load(Path(folder) / "task.pt")
        torch.set_num_threads(1)
        if device == "cuda":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.distributed.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(rank, *args), _file(folder, rank, "result"))
        torch.distributed.barrier()  # nobody leaves while another rank still talks to it
        torch.distributed.destroy_process_group()
    except BaseException as error:
        _save_error(error, _file(folder, rank, "error"))
        sys.exit(1)


def _wait(processes: list[ForkServerProcess], folder: str, timeout: float) -> None:
    """Until all are done, or one has failed (raises what it raised), or time is up."""
    deadline = time.monotonic() + timeout
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        done = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise TimeoutError(f"ranks {sorted(running.values())} did not finish within {timeout:g} s")
        ended = [running.pop(sentinel) for sentinel in done]
        for rank in ended:
            processes[rank].join()
        if any(processes[rank].exitcode != 0 for rank in ended):
            _raise_first_error(processes, folder)


def _raise_first_error(processes: list[ForkServerProcess], folder: str) -> None:
    """The earliest error: the later ones are often ranks that lost a peer."""
    errors = []
    for rank, process in enumerate(processes):
        if _file(folder, rank, "error").exists():
            when, error, text = pickle.loads(_file(folder, rank, "error").read_bytes())
            errors.append((when, rank, error, text))
        elif process.exitcode not in (None, 0):
            raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}")
    _, rank, error, text = min(errors, key=lambda entry: entry[:2])
    error.add_note(f"raised on rank {rank} of {len(processes)}:\n{text}")
    raise error


def _save_error(error: BaseException, path: Path) -> None:
    when, text = time.monotonic(), traceback.format_exc()
    try:
        record = pickle.dumps((when, error, text))
        pickle.loads(record)
    except Exception:  # an exception that does not survive pickling
        record = pickle.dumps((when, RuntimeError(f"{type(error).__name__}: {error}"), text))
    part = path.with_suffix(".part")
    part.write_bytes(record)
    part.rename(path)


def _file(folder: str, rank: int, what: str) -> Path:
    return Path(folder) / f"{what}-{rank}.pt"


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=False, map_location="cpu")
