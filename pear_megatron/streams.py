"""Standard output and error as commands need them: a reader may go away, or read another alphabet."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from pear_megatron.storage import naming


class _Error(io.TextIOWrapper):
    """Standard error. What nobody can read any more is dropped, and the work goes on."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


class _Output(io.TextIOWrapper):
    """Standard output, whose errors say so."""

    def write(self, text: str) -> int:
        with naming(Path("standard output")):
            return super().write(text)

    def flush(self) -> None:
        with naming(Path("standard output")):
            super().flush()


def log_lines(level: int = logging.NOTSET) -> None:
    """Has standard error get warnings, this package's log lines from a level on, and none of Python's of libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pear_megatron").setLevel(level)
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)


def steady() -> None:
    """Has a command go on when its log's pipe breaks, and write what an encoding does not have as escapes.

    Streams that somebody has replaced, as tests and notebooks do, stay as they are.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would be taken for it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _stream(_Output, 1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(_Error, 2, sys.stderr)


def _stream(kind: type[io.TextIOWrapper], descriptor: int, before: Any) -> io.TextIOWrapper:
    lines = kind is _Error or (before is not None and before.line_buffering)
    encoding = "utf-8" if before is None else before.encoding
    file = open(descriptor, "wb", closefd=False)  # noqa: SIM115 - open as long as the process
    return kind(file, encoding=encoding, errors="backslashreplace", line_buffering=lines)
