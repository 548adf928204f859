"""Being asked to stop: SIGTERM and SIGUSR1 become a flag that training reads between two steps.

What a scheduler sends before it takes the machine away (Slurm's ``--signal``, a preemption, torchrun's
own end) must not tear a step apart: the run finishes it, saves, and ends with EXIT_REQUEUE.
"""

from __future__ import annotations

import signal
from pathlib import Path

from pear_megatron.storage import write_atomically

# EX_TEMPFAIL of sysexits.h: failed for now, try again later. The exit code of "saved; requeue me".
EXIT_REQUEUE = 75
# In output_dir while a run that was asked to stop waits for being started again: torchrun hides exit codes.
REQUEUE_FILE = "requeue"

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop; ``install`` makes it listen."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Listens from now on (in the main thread, as Python wants it)."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        self.requested = True

    @staticmethod
    def ignore() -> None:
        """Hears nothing from now on: a process on its way out must not be killed by a second request."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def leave_requeue_file(output_dir: str, message: str) -> None:
    """Says beside the run's other files that the same command goes on from here."""
    write_atomically(Path(output_dir) / REQUEUE_FILE, message + "\n")


def remove_requeue_file(output_dir: str) -> None:
    """Takes it back: a run that starts has nothing to be requeued for yet."""
    try:
        (Path(output_dir) / REQUEUE_FILE).unlink(missing_ok=True)
    except OSError:
        return  # a folder that cannot be written is said where it is written to
