"""Progress of long work: a bar on a terminal, elsewhere a line now and then, at least every half minute."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from pear_megatron.watch import SECONDS, duration, now, said, working

log = logging.getLogger("pear_megatron")


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
    columns = (TextColumn("scoring"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
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
        moment = time.monotonic()
        if moment - self._said < SECONDS:
            return
        self._said = moment
        said()
        seconds = moment - self._started
        left = seconds * (self._total - self._done) / max(self._done, 1)
        log.info(
            "scored %s of %s tokens, %s tokens/s, %s left",
            f"{self._replicas * self._done:,}",
            f"{self._replicas * self._total:,}",
            f"{self._replicas * self._done / seconds:,.0f}",
            duration(left),
        )


@contextmanager
def reading_progress(files: list[Path], show: bool) -> Iterator[Callable[[float], Any]]:
    """A bar on standard error, if ``show``; yields what is called with the bytes that each row took.

    Elsewhere than on a terminal a line every half minute says how far it is.
    """
    total = sum(file.stat().st_size for file in files)
    read = _Read(total)
    with working("reading trajectories"):
        if not show:
            yield read
            return
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("reading trajectories", total=total)

            def advance(size: float) -> None:
                read(size)
                bar.advance(task, size)

            yield advance


class _Read:
    """Keeps the watch's words up to date; called once a row."""

    def __init__(self, total: int) -> None:
        self._total, self._done = max(total, 1), 0.0

    def __call__(self, size: float) -> None:
        self._done += size
        now(f"reading trajectories: {min(self._done / self._total, 1):.0%}")


class Progress:
    """A context manager; ``advance`` says what was done and about how long the rest takes."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._started = title, total, time.monotonic()
        self._done = self._timed = 0
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn(f"[bold]{title}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=total)
        self._interactive = console.is_terminal

    def __enter__(self) -> Progress:
        now(f"{self._title} 0/{self._total}")
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, text: str, *, found: bool = False) -> None:
        """One more is done; ``found`` = it was done before, and says nothing of how long the rest takes."""
        self._done += 1
        self._timed += not found
        left = ""
        if self._timed and self._done < self._total:
            seconds = (time.monotonic() - self._started) / self._timed * (self._total - self._done)
            left = f"  (about {max(1, round(seconds / 60))} min left)"
        line = f"{self._title} {self._done}/{self._total}  {text}{left}"
        self._bar.advance(self._task)
        if self._interactive:
            self._bar.console.print(line, style="dim", soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
            said(f"{self._title} {self._done}/{self._total}")


_REPORTS = 20  # lines of progress where there is no terminal


@contextmanager
def sampling_progress(done: int, total: int) -> Iterator[Any]:
    """A function to call after each batch: a bar on a terminal, now and then a line elsewhere."""
    console = Console(stderr=True)
    status_column = TextColumn("{task.fields[status]}")
    columns = (
        TextColumn("[bold]eval"), BarColumn(), MofNCompleteColumn(), status_column, TimeRemainingColumn()
    )  # fmt: skip
    count, score = done, 0.0
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("eval", total=total, completed=done, status="")

        def advance(number: int, rows: list[dict[str, Any]]) -> None:
            nonlocal count, score
            before, count = count, count + number
            score += sum(row["score"] for row in rows)
            status = f"mean score {score / (count - done):.3f}"
            bar.update(task, completed=count, status=status)
            if not console.is_terminal and before * _REPORTS // total < count * _REPORTS // total:
                print(f"{count}/{total} responses  {status}", file=sys.stderr, flush=True)
                said(f"eval: {count}/{total} responses")

        yield advance
