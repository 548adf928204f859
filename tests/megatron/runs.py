"""Real training runs: the entry point on the tiny recipe, in processes forked from one server or by torchrun."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.distributed import _FORKSERVER

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "recipes" / "sft" / "tiny.yaml"
# What differs between two runs that are the same.
TIMES = {"step_seconds", "tokens_per_second", "mfu"}


def write_trajectories(
    path: Path, count: int = 40, *, longest: int = 60, seed: int = 0, logprob: float = -6.9
) -> Path:
    """Random token ids of the tiny recipe's vocabulary, log-probs just below ``logprob``, mixed rewards."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(count):
            tokens, prompt = rng.randint(8, longest), rng.randint(1, 5)
            mask = [0] * prompt + [1] * (tokens - prompt)
            row = {
                "id": f"trajectory-{i}",
                "input_ids": [rng.randrange(1000) for _ in range(tokens)],
                "loss_mask": mask,
                "behavior_logprobs": [logprob - 0.2 * rng.random() if m else 0.0 for m in mask],
                "reward": rng.choice([1.0, 1.0, 1.0, -0.5]),
            }
            file.write(json.dumps(row) + "\n")
    return path


class Started:
    """``python -m pear_megatron.train`` on some ranks: as torchrun starts it, in a fraction of the time.

    ``config=None`` leaves out --config; ``target`` is another program (``run_program``).
    """

    def __init__(
        self,
        processes: int,
        *overrides: str,
        config: Path | None = TINY,
        target: Callable[[int, int, int, Connection, list[str]], None] | None = None,
    ) -> None:
        # Through pipes: a limit on the size of files, or a full disk, must not cut what a test reads.
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(processes)]
        self._said = [bytearray() for _ in range(processes)]
        self._readers = [
            threading.Thread(target=_read, args=(end, said), daemon=True)
            for (end, _), said in zip(pipes, self._said, strict=True)
        ]
        # Held open here, as torchrun holds it: a port that is only known to be free may be somebody else's soon.
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        arguments = [*(["--config", str(config)] if config else []), *overrides]
        self.ranks = [
            _FORKSERVER.Process(
                target=target or run_entry_point,
                args=(rank, processes, self._store.port, pipes[rank][1], arguments),
            )
            for rank in range(processes)
        ]
        for process, (_, write_end), reader in zip(self.ranks, pipes, self._readers, strict=True):
            process.start()
            write_end.close()
            reader.start()

    def send(self, number: signal.Signals, rank: int = 0) -> None:
        """A signal to one rank."""
        os.kill(self.ranks[rank].pid or 0, number)

    def kill(self) -> None:
        """SIGKILL to every rank, but not to the processes that they started."""
        for process in self.ranks:
            process.kill()

    def wait(self, timeout: float = 600) -> list[int | None]:
        """Exit codes of the ranks; those that go on after the timeout are killed and have None."""
        deadline = time.monotonic() + timeout
        codes = []
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            codes.append(process.exitcode)
        for process, reader in zip(self.ranks, self._readers, strict=True):
            process.kill()
            process.join()
            reader.join(10)  # a background writer that outlives its rank holds the pipe open
        return codes

    def output(self, rank: int = 0) -> str:
        """What a rank has written to standard output and error so far."""
        return self._said[rank].decode(errors="replace")


def _read(end: Connection, said: bytearray) -> None:
    with os.fdopen(os.dup(end.fileno()), "rb", buffering=0) as pipe:
        end.close()
        while chunk := pipe.read(65536):
            said.extend(chunk)


def run_entry_point(
    rank: int,
    world: int,
    port: int,
    output: Connection,
    arguments: list[str],
    *,
    local_rank: int | None = None,
) -> None:
    """What a rank of ``Started`` does, unless ``target`` says otherwise; all are of one node."""
    _say_into(output)
    _set_torchruns_environment(rank, world, port, local_rank)
    from pear_megatron.train.__main__ import main

    main(arguments)


def run_program(
    program: str,
    rank: int,
    world: int,
    port: int,
    output: Connection,
    arguments: list[str],
    *,
    by_torchrun: bool = True,
) -> None:
    """The same for another program, a module or a file: ``partial(run_program, program)`` is a ``target``."""
    _say_into(output)
    if by_torchrun:
        _set_torchruns_environment(rank, world, port)
    os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
    warnings.simplefilter("ignore")
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _say_into(output: Connection) -> None:
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    torch.set_num_threads(1)


def _set_torchruns_environment(rank: int, world: int, port: int, local_rank: int | None = None) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank if local_rank is None else local_rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def launch(
    processes: int, *overrides: str, check: bool = True, **started: Any
) -> subprocess.CompletedProcess[str]:
    """A run to its end -> the first exit code that is not 0, and what all ranks said, rank 0 first."""
    run = Started(processes, *overrides, **started)
    codes = run.wait()
    output = "".join(run.output(rank) for rank in range(processes))
    code = next((code for code in codes if code != 0), 0)
    if check and code != 0:
        raise AssertionError(f"{overrides} ended with {codes}:\n{output[-6000:]}")
    return subprocess.CompletedProcess(overrides, code if code is not None else -1, "", output)


def torchrun(processes: int, *overrides: str, config: Path = TINY) -> subprocess.Popen[str]:
    """The same, started by torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "pear_megatron.train", "--config", str(config), *overrides]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl; of one that is still going on, the whole ones."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def train(folder: Path, data: Path, processes: int, *overrides: str) -> list[dict[str, Any]]:
    """A run of six steps -> its metrics."""
    launch(processes, f"data.train={data}", f"output_dir={folder}", "train.max_steps=6", *overrides)
    return metrics(folder)
