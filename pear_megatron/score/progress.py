"""Progress of scoring: a bar on a terminal, a log line now and then otherwise."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("pear_megatron")
_LOG_SECONDS = 30.0


@contextmanager
def token_progress(total: int, *, replicas: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields what is called with the tokens that this replica has scored.

    Args:
        total: tokens that this replica will score.
        replicas: that run at the same pace; the speed shown is that of all.
        show: False on all ranks but one.
    """
    if not show:
        yield lambda tokens: None
    elif sys.stderr.isatty():
        with _bar(total, replicas) as advance:
            yield advance
    else:
        yield _Lines(total, replicas)


@contextmanager
def _bar(total: int, replicas: int) -> Iterator[Callable[[int], None]]:
    from rich import progress as rich
    from rich.console import Console

    columns = [
        rich.TextColumn("scoring"),
        rich.BarColumn(),
        rich.TextColumn("{task.fields[said]}"),
        rich.TimeRemainingColumn(),
    ]
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, said="")
        started, done = time.monotonic(), 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            rate = replicas * done / max(time.monotonic() - started, 1e-9)
            said = f"{replicas * done:,} of {replicas * total:,} tokens, {rate:,.0f} tokens/s"
            bar.update(task, completed=done, said=said)

        yield advance


class _Lines:
    """A log line at most every half minute."""

    def __init__(self, total: int, replicas: int) -> None:
        self._total, self._replicas = total, replicas
        self._started = self._said = time.monotonic()
        self._done = 0

    def __call__(self, tokens: int) -> None:
        self._done += tokens
        now = time.monotonic()
        if now - self._said < _LOG_SECONDS:
            return
        self._said = now
        seconds = now - self._started
        left = seconds * (self._total - self._done) / max(self._done, 1)
        log.info(
            "scored %s of %s tokens, %s tokens/s, %s left",
            f"{self._replicas * self._done:,}",
            f"{self._replicas * self._total:,}",
            f"{self._replicas * self._done / seconds:,.0f}",
            _duration(left),
        )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 60 else f"{minutes // 60} h {minutes % 60} min"
