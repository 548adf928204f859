"""lock: a folder that one process at a time works in."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pear_megatron.errors import PearError

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """Holds a folder; the end of the process lets go of it, however it came. Without effect where the file
    system has no locks.

    Raises:
        PearError: another process holds it, and ``wait`` is False.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise PearError(
                f"another pear-megatron compare is at work in {folder}; wait for it, or choose another output_dir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
