"""Being asked to stop: SIGTERM, SIGUSR1 and Ctrl-C become a flag that training reads between two steps.

What a scheduler sends before it takes the machine away (Slurm's ``--signal``, a preemption, torchrun's
own end) must not tear a step apart: the run finishes it, saves, and ends with EXIT_REQUEUE.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from pear_megatron import interrupt
from pear_megatron.storage import write_atomically

# EX_TEMPFAIL of sysexits.h: failed for now, try again later. The exit code of "saved; requeue me".
EXIT_REQUEUE = 75
# In output_dir while a run that was asked to stop waits for being started again: torchrun hides exit codes.
REQUEUE_FILE = "requeue"

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SECONDS_OF_ONE_CTRL_C = 0.5  # torchrun may pass on what its processes have from the terminal already


class StopRequest:
    """Whether this process was asked to stop; ``install`` makes it listen.

    Attributes:
        requested: SIGTERM or SIGUSR1 came, or a Ctrl-C while there were steps to save.
        interrupted: it was Ctrl-C.
    """

    def __init__(self) -> None:
        self.requested = self.interrupted = False
        self._kept: str | None = None
        self._first = 0.0
        self._owner = os.getpid()

    def install(self) -> None:
        """Listens from now on (in the main thread, as Python wants it)."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGINT, self._on_interrupt)

    def saves(self, root: Path) -> None:
        """From now on a Ctrl-C has the run save into ``root`` first; before, there is nothing to save."""
        self._kept = f"whole checkpoints in {root} stay, and the same command goes on from the newest"

    def _on_signal(self, *_: object) -> None:
        self.requested = True

    def _on_interrupt(self, *_: object) -> None:
        if os.getpid() != self._owner:  # one that writes a checkpoint: its parent knows whether it is needed
            return
        if self._kept is None:
            interrupt.end("interrupted before training began; the same command starts again")
        if not self.interrupted:
            self.requested = self.interrupted = True
            self._first = time.monotonic()
            interrupt.say("interrupted: the run ends and saves after this step; Ctrl-C again ends it at once")
        elif time.monotonic() - self._first > _SECONDS_OF_ONE_CTRL_C:
            interrupt.end(f"ended at once; {self._kept}")

    @staticmethod
    def ignore() -> None:
        """Hears nothing from now on: a process on its way out must not be killed by a second request."""
        for number in (*_SIGNALS, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def leave_requeue_file(output_dir: str, message: str) -> None:
    """Says beside the run's other files that the same command goes on from here."""
    write_atomically(Path(output_dir) / REQUEUE_FILE, message + "\n")


def remove_requeue_file(output_dir: str) -> None:
    """Takes it back: a run that starts has nothing to be requeued for yet."""
    with suppress(OSError):  # a folder that cannot be written is said where it is written to
        (Path(output_dir) / REQUEUE_FILE).unlink(missing_ok=True)
