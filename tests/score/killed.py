"""Runs one job again and again in forked processes that are killed on the way, until one comes to its end.

    python killed.py MODEL DATA OUTPUT renames|moments

renames: attempts die by SIGKILL right after their first rename, right before their first, right after their
second, right before their second, and so on. moments: ten attempts die at random moments. Prints how many died.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import jinja2  # noqa: F401  # these imports: once, for all attempts
import pyarrow.dataset  # noqa: F401
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.score.jobs import run_job


def die_at_rename(number: int, *, after: bool) -> None:
    """This process kills itself right before or after its ``number``-th os.replace."""
    replace, seen = os.replace, 0

    def deadly(source: str, target: str) -> None:
        nonlocal seen
        seen += 1
        if seen == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly


def start(number: int | None, *job: Path) -> int:
    """Forks a process that runs the job, and dies at a rename unless ``number`` is None; its id."""
    child = os.fork()
    if child:
        return child
    if number is not None:
        die_at_rename(1 + number // 2, after=number % 2 == 0)
    try:
        run_job(job[1], job[2], job[0], chunk_rows=2)
    except BaseException as error:
        print(f"attempt {number}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def is_killed(child: int) -> bool:
    """Waits; False if it came to its end. Exits if it failed."""
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(1)
    return not os.WIFEXITED(status)


def killed_at_renames(*job: Path) -> int:
    """How many attempts died."""
    number = 0
    while is_killed(start(number, *job)):
        number += 1
    return number


def killed_at_moments(*job: Path) -> int:
    """How many attempts died."""
    started = time.monotonic()
    is_killed(start(None, *job[:2], job[2].with_name("unhurried.parquet")))
    longest = time.monotonic() - started
    job[2].with_name("unhurried.parquet").unlink()
    rng, killed = random.Random(0), 0
    for _ in range(10):
        child = start(None, *job)
        time.sleep(rng.uniform(0, longest / 2))
        os.kill(child, signal.SIGKILL)
        killed += is_killed(child)
    is_killed(start(None, *job))
    return killed


if __name__ == "__main__":
    run = {"renames": killed_at_renames, "moments": killed_at_moments}[sys.argv[4]]
    print(run(*map(Path, sys.argv[1:4])))
