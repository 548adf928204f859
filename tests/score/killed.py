"""Runs one job again and again in forked processes that are killed on the way, until one comes to its end.

    python killed.py MODEL DATA OUTPUT renames|moments

renames: attempts die by SIGKILL right after their first rename, right before their first, right after their
second, right before their second, and so on. moments: six attempts die after shares of the time that the job takes,
whatever they are at. Prints how many died.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
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


def die_after(cpu_seconds: float) -> None:
    """The kernel ends this process, with no handler run, once it has computed for so long."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


def start(prepare_to_die: Callable[[], None], *job: Path) -> int:
    """Forks a process that runs the job; its id."""
    child = os.fork()
    if child:
        return child
    prepare_to_die()
    try:
        run_job(job[1], job[2], job[0], chunk_rows=4)
    except BaseException as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)
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
    while is_killed(start(partial(die_at_rename, 1 + number // 2, after=number % 2 == 0), *job)):
        number += 1
    return number


def killed_at_moments(*job: Path) -> int:
    """How many attempts died."""
    unhurried = job[2].with_name("unhurried.parquet")
    is_killed(start(lambda: None, *job[:2], unhurried))
    unhurried.unlink()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    killed = 0
    for share in (0.1, 0.25, 0.4, 0.5, 0.6, 0.7):
        moment = share * random.uniform(0.9, 1.1) * (usage.ru_utime + usage.ru_stime)
        killed += is_killed(start(partial(die_after, moment), *job))
    is_killed(start(lambda: None, *job))
    return killed


if __name__ == "__main__":
    run = {"renames": killed_at_renames, "moments": killed_at_moments}[sys.argv[4]]
    print(run(*map(Path, sys.argv[1:4])))
