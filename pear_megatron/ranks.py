"""Ranks: a command is started on several of them, and what one does, or fails at, is everybody's."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from pear_megatron.errors import CheckpointError, PearError, RecipeError, one_sentence
from pear_megatron.storage import describe_changes
from pear_megatron.watch import leave_to_others

_SECONDS_FOR_RANK_0 = 3.0
_SECONDS_OF_A_SLOW_FOLDER = 30.0  # until a network file system shows a node what another one wrote
_PATIENCE = timedelta(days=7)
_PARENT = "PEAR_MEGATRON_PARENT"
_PR_SET_PDEATHSIG = 1  # prctl(2)
_T = TypeVar("_T")


def ensure_ranks(ranks: int, *, copies: int | None = None) -> None:
    """Makes sure that this command runs on ``ranks`` ranks: starts itself again under torchrun if need be.

    With one rank, or inside a torchrun world of that size, returns. Otherwise this process becomes torchrun and
    ends with the ranks' exit code; call it before anything expensive, and before torch is initialised.

    Args:
        ranks: tensor x pipeline parallel size.
        copies: data-parallel copies of that to start; a torchrun world may then hold any number of them.
            None = exactly one.

    Raises:
        PearError: the command runs under torchrun with another number of processes.
    """
    world = os.environ.get("WORLD_SIZE")
    if world is not None:
        if int(world) != ranks and (copies is None or int(world) % ranks):
            wanted = f"{ranks}" if copies is None else f"a multiple of {ranks}"
            raise PearError(
                f"torchrun started {world} process(es) and the command asks for {wanted} (tensor x pipeline "
                "parallel size); start it with as many, or without torchrun"
            )
        return
    processes = ranks * (copies or 1)
    if processes == 1:
        return
    sys.exit(run_ranks(processes, "pear_megatron.cli", sys.argv[1:]))


def run_ranks(processes: int, module: str, arguments: list[str]) -> int:
    """Runs a module on so many ranks of this machine, as torchrun does, and ends with what they say.

    torchrun's own reports would follow the user's error; they are left out. A Ctrl-C is passed on to the ranks,
    without torchrun's limit of 30 s.

    Returns:
        The exit code of the rank that ended first with another than 0; 128 + N where a signal N ended it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    leave_to_others()
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, _pass_on)
    options = parse_args(["--standalone", f"--nproc-per-node={processes}", "-m", module, *arguments])
    os.environ[_PARENT] = str(os.getpid())
    options.signals_to_handle = "SIGTERM,SIGHUP,SIGQUIT"  # torch 2.6 still handles SIGINT too
    try:
        run(options)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        told = error.failures.get(0)
        if told is None or told.exitcode < 0 or failure.exitcode < 0:  # a rank that was killed says nothing
            print(f"error: rank {rank}: {failure.message}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def end_with_parent() -> None:
    """Has a rank that ``run_ranks`` started get SIGTERM when that process dies, however it came: a run saves then."""
    parent = os.environ.pop(_PARENT, None)
    if parent is not None and "WORLD_SIZE" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != int(parent):  # it is dead already
            os.kill(os.getpid(), signal.SIGTERM)


# Becomes the command that its arguments are, which dies with the process whose id is the first of them.
_MORTAL = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})
os.getppid() == int(sys.argv[1]) or sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def mortal(command: list[str]) -> list[str]:
    """The command, to be started by this process and to be killed with it."""
    return [sys.executable, "-c", _MORTAL, str(os.getpid()), *command]


def _pass_on(number: int, _: object) -> None:
    """Sends a signal to this process's children."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text(encoding="utf-8").split():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)


def is_main() -> bool:
    """Whether this process prints and writes: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def report_error(error: BaseException) -> None:
    """Prints a command's error, by one rank of each node, and puts it into torchrun's own report.

    All but rank 0 give it time: torchrun ends every rank as soon as one has left.
    """
    if is_main() or os.environ.get("LOCAL_RANK") == "0":
        print(f"error: {one_sentence(error)}", file=sys.stderr, flush=True)
    if not is_main():
        time.sleep(_SECONDS_FOR_RANK_0)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(report).write_text(
            json.dumps({"message": str(error), "timestamp": int(time.time())}), encoding="utf-8"
        )


# What gloo and NCCL say of a rank that has ended.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def of_another_rank(error: BaseException) -> PearError | None:
    """What to say of an error that another rank's end brought about; None = it was something else.

    Gives the other rank, and who started both, time to speak first.
    """
    if not isinstance(error, RuntimeError) or not any(words in str(error) for words in _GONE):
        return None
    time.sleep(_SECONDS_FOR_RANK_0)
    return PearError(
        f"{_this_rank()} has lost another rank, or its node: what that rank or its node's log says last is the cause; "
        "the same command goes on from the last checkpoint"
    )


def from_main(work: Callable[[], _T], *, group: Any = None) -> _T:
    """What ``work`` returns on rank 0, on every rank; it and its error are picklable.

    Args:
        work: called by rank 0 alone.
        group: of all ranks, to wait in; None = the default one.

    Raises:
        PearError: on every rank, what rank 0 raised; an OSError becomes a CheckpointError.
    """
    import torch

    if not torch.distributed.is_initialized():
        result, failure = _attempt(work)
    else:
        outcome = list(_attempt(work)) if torch.distributed.get_rank() == 0 else [None, None]
        torch.distributed.broadcast_object_list(outcome, src=0, group=group)
        result, failure = outcome
    if failure is not None:
        raise failure
    return result


def together(work: Callable[[], _T]) -> _T:
    """What this rank's part of the work returns, once the others have done theirs.

    Raises:
        PearError: on every rank, what the first rank that failed raised; an OSError becomes a CheckpointError.
    """
    import torch

    result, failure = _attempt(work)
    failures = [failure]
    if torch.distributed.is_initialized():
        failures = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failures, failure)
    for found in failures:
        if found is not None:
            raise found
    return result


def patient_group() -> Any:
    """A group of all ranks to wait for long work in, where NCCL and gloo give up after half an hour."""
    import torch

    if not torch.distributed.is_initialized():
        return None
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)


def check_same_on_every_rank(settings: Mapping[str, Any], *, may_differ: tuple[str, ...] = ()) -> None:
    """Refuses ranks that would train something else than rank 0: together they would train neither.

    Args:
        settings: of this rank.
        may_differ: dotted keys, or beginnings of keys.

    Raises:
        RecipeError: on every rank; names a rank, its node and the keys.
    """
    first = from_main(lambda: dict(settings))

    def compare() -> None:
        if changes := describe_changes(first, settings, but=may_differ):
            raise RecipeError(
                f"{_this_rank()} differs from rank 0: {changes}; give every node the same command, recipe, versions "
                "and weights"
            )

    together(compare)


def same_on_every_node(name: str, work: Callable[[], _T]) -> _T:
    """What ``work``, a look at what each node has a copy of, returns on rank 0; called by one rank of each node.

    Where no local ranks are known, every rank calls it.

    Args:
        name: of what it returns.

    Raises:
        RecipeError: on every rank: on some node it returns something else; names a rank of that node.
        PearError: on every rank, what it raised on the first that failed.
    """
    looks = is_main() or os.environ.get("LOCAL_RANK", "0") == "0"
    found = together(lambda: work() if looks else None)
    first = from_main(lambda: found)
    check_same_on_every_rank({name: found if looks else first})
    return cast(_T, first)


def check_shared(folder: Path, key: str) -> None:
    """Refuses a folder that rank 0 made and another node does not have: what its ranks write would be lost.

    Args:
        key: what the user chooses it by.

    Raises:
        RecipeError: on every rank; names a rank and its node.
        CheckpointError: nothing can be written there.
    """
    mark = from_main(lambda: folder / f".shared-{uuid.uuid4().hex[:8]}")
    from_main(mark.touch)
    try:
        together(lambda: require_seen(mark, f"{key} {folder}"))
    finally:
        if is_main():
            mark.unlink(missing_ok=True)


def require_seen(path: Path, place: str) -> None:
    """Waits until this rank's node sees what rank 0 has written.

    Args:
        place: the key by which the user chooses the folder, and the folder.

    Raises:
        RecipeError: it does not; names the rank and its node.
    """
    deadline = time.monotonic() + _SECONDS_OF_A_SLOW_FOLDER
    while not path.exists():
        if time.monotonic() > deadline:
            raise RecipeError(
                f"{_this_rank()} does not see what rank 0 writes to {place}; choose a folder on a file system that "
                "every node has"
            )
        time.sleep(0.5)


def _this_rank() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def _attempt(work: Callable[[], Any]) -> tuple[Any, PearError | None]:
    try:
        return work(), None
    except PearError as error:
        return None, error
    except OSError as error:
        failure = CheckpointError(f"cannot write: {error}")
        failure.__cause__ = error
        return None, failure
