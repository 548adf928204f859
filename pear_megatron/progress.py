"""Progress of a comparison: a bar on a terminal, a line for each part that is done everywhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """A context manager; ``advance`` says what was done and about how long the rest takes."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done, self._started = title, total, 0, time.monotonic()
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn(f"[bold]{title}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=total)
        self._interactive = console.is_terminal

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, text: str) -> None:
        """One more is done."""
        self._done += 1
        seconds = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        left = f"  (about {max(1, round(seconds / 60))} min left)" if self._done < self._total else ""
        line = f"{self._title} {self._done}/{self._total}  {text}{left}"
        self._bar.advance(self._task)
        if self._interactive:
            self._bar.console.print(line, style="dim", soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
