"""Ctrl-C: one line that says what is kept and how to go on, then the end of the process; no traceback."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from pear_megatron.ranks import is_main

# What a shell gives for a command that Ctrl-C ended.
EXIT_INTERRUPTED = 128 + signal.SIGINT
_SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides


def say(text: str) -> None:
    """A line on standard error, by rank 0 alone; for signal handlers, which must not touch Python's buffers."""
    if not is_main():
        return
    line = f"{text}\n".encode()
    if sys.stderr.isatty():
        line = b"\n" + _SHOW_CURSOR + line  # after the terminal's ^C
    with suppress(OSError):  # nobody reads it any more
        os.write(2, line)


def end(text: str) -> NoReturn:
    """Says it and ends this process at once."""
    say(text)
    os._exit(EXIT_INTERRUPTED)


def end_on_interrupt(kept: str, *, clean: bool = False) -> None:
    """Has Ctrl-C end this process with a line, from now on.

    Args:
        kept: what is kept, and which command goes on.
        clean: let ``finally`` clauses remove what is half done. Without it the process ends where it stands,
            which also ends it while its threads are at work.
    """
    owner = os.getpid()

    def on_interrupt(*_: object) -> None:
        if os.getpid() != owner:  # a fork: its parent speaks
            os._exit(EXIT_INTERRUPTED)
        signal.signal(signal.SIGINT, signal.SIG_IGN if clean else signal.SIG_DFL)
        if not clean:
            end(f"interrupted; {kept}")
        say(f"interrupted; {kept}")
        sys.exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGINT, on_interrupt)
