"""The watch: a command that is piped into a log says something at least every half minute."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SECONDS = 30.0


class _Watch:
    """Says what is at work whenever nothing else has been said for a while.

    A thread of its own writes past Python's buffers and their locks, which a fork might take along.
    """

    def __init__(self) -> None:
        self._work: list[tuple[str, float]] = []  # what is done, and since when; the innermost is last
        self._quiet_since = 0.0
        self._ended = threading.Event()

    def begin(self, what: str) -> None:
        now = time.monotonic()
        self._work.append((what, now))
        if len(self._work) == 1:
            self._quiet_since, self._ended = now, threading.Event()
            threading.Thread(target=self._run, args=(self._ended,), daemon=True).start()

    def end(self) -> None:
        if self._work:
            self._work.pop()
        if not self._work:
            self._ended.set()

    def said(self, what: str | None) -> None:
        self._quiet_since = time.monotonic()
        if what is not None and self._work:
            self._work[-1] = what, self._quiet_since

    def now(self, what: str) -> None:
        if self._work:
            self._work[-1] = what, self._work[-1][1]

    def leave(self) -> None:
        self._work.clear()
        self._ended.set()

    def _run(self, ended: threading.Event) -> None:
        while not ended.wait(max(self._quiet_since + SECONDS - time.monotonic(), 0.001)):
            now, work = time.monotonic(), self._work[-1:]
            if work and now - self._quiet_since >= SECONDS:
                self._quiet_since = now
                what, since = work[0]
                with suppress(OSError):  # standard error is closed, or full and not waited for
                    os.write(2, f"{what}; still at work after {duration(now - since)}\n".encode())


_watch = _Watch()


@contextmanager
def working(what: str) -> Iterator[None]:
    """While the body runs, rank 0 says ``what`` whenever half a minute went by without a word; not on a terminal.

    Words are those of this module and those that ``said`` is told of.
    """
    if sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield
        return
    _watch.begin(what)
    try:
        yield
    finally:
        _watch.end()


def said(what: str | None = None) -> None:
    """Something was printed; the innermost work is now ``what``, unless that is None."""
    _watch.said(what)


def leave_to_others() -> None:
    """From here on, other processes say what is at work."""
    _watch.leave()


def now(what: str) -> None:
    """The innermost work has come so far; nothing was printed."""
    _watch.now(what)


def duration(seconds: float) -> str:
    """``42 s``, ``5 min`` or ``1 h 7 min``."""
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds:.0f} s" if seconds < 59.5 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
