"""run_stage: a function in processes of its own, its output in a log; an error names the log and its end.

On the CPU the processes are forked from a server that has imported torch, Megatron-Core and TRL once: a stage of
a small run then costs what it does, not twenty seconds of imports.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from pear_megatron.errors import PearError, of_the_system
from pear_megatron.streams import steady

_CONTEXT = multiprocessing.get_context("forkserver")
_LINES = 15
_ROOM = 1 << 16  # bytes


class StageError(PearError):
    """A stage of a cell that failed."""


def preload() -> None:
    """Tells the server what to import; before the first stage."""
    import torch

    if not torch.cuda.is_available():  # with a GPU, Transformer Engine starts CUDA, which no fork survives
        _CONTEXT.set_forkserver_preload(["pear_megatron.compare.preload"])


def run_stage(
    function: Callable[..., None],
    *arguments: Any,
    log: Path,
    threads: int,
    ranks: int | None,
    running: set[ForkServerProcess],
    stopped: threading.Event,
) -> None:
    """Runs ``function(*arguments)`` and waits for it.

    Args:
        function: picklable, as its arguments.
        log: gets standard output and error; what an earlier attempt wrote stays above.
        threads: of a process.
        ranks: as many processes with torchrun's environment; None = one without.
        running: holds the processes while they run, for whoever wants to stop them.
        stopped: once it is set, nothing goes on; set it before killing what ``running`` holds.

    Raises:
        StageError: a process failed; quotes the end of the log.
    """
    from torch.distributed import TCPStore

    log.parent.mkdir(parents=True, exist_ok=True)
    earlier = log.stat().st_size if log.exists() else 0
    # Held open here, as torchrun holds it: a port that is only known to be free may be somebody else's soon.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks else None
    port = store.port if store else 0
    processes = [
        _CONTEXT.Process(
            target=_run, args=(function, arguments, log, threads, _torchrun_environment(rank, ranks, port))
        )
        for rank in range(ranks or 1)
    ]
    started: list[ForkServerProcess] = []
    try:
        for process in processes:
            if stopped.is_set():
                raise StageError(f"{log.stem} was stopped")
            process.start()
            started.append(process)
            running.add(process)
        if stopped.is_set():  # set before `running` held the last one
            raise StageError(f"{log.stem} was stopped")
        _wait(processes)
    finally:
        for process in started:
            process.kill()
            process.join()
            running.discard(process)
    codes = [process.exitcode for process in processes]
    if any(codes):
        # Of this attempt: an error that an earlier one wrote would be a wrong trail.
        lines = log.read_bytes()[earlier:].decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        said = errors[-1:] or lines[-_LINES:]
        if 255 in codes and not errors:
            said.append("(exit code 255: the process that forks the stages was killed; is memory short?)")
        if shutil.disk_usage(log.parent).free < _ROOM:
            said.append(f"(the disk of {log.parent} is full)")  # and the log may lack its end
        raise StageError(f"{log.stem} failed (exit codes {codes}); {log} ends with:\n" + "\n".join(said))


def _wait(processes: list[ForkServerProcess]) -> None:
    """Until all have ended, or one has failed and the others had time to say why."""
    left = {process.sentinel: process for process in processes}
    while left:
        for sentinel in wait(list(left)):
            process = left.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            if process.exitcode:
                deadline = time.monotonic() + 5.0
                while left and time.monotonic() < deadline:
                    for other in wait(list(left), timeout=max(0.0, deadline - time.monotonic())):
                        left.pop(other).join()  # type: ignore[arg-type]
                return


def _torchrun_environment(rank: int, ranks: int | None, port: int) -> dict[str, str]:
    if ranks is None:
        return {}
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}


def _end_with_parent() -> None:
    """Ends this process when the comparison is killed: the next one continues the folder that it writes into."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    log: Path,
    threads: int,
    environment: dict[str, str],
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    steady()
    os.environ |= {"OMP_NUM_THREADS": str(threads), **environment}
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    try:
        function(*arguments)
    except PearError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if told := of_the_system(error, log.parent):
            print(f"error: {told}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
