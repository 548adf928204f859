"""PearError: what a user can mend; its message says what is wrong, where, and the way out."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path


class PearError(Exception):
    """Base of the package's errors about recipes, data, checkpoints and training runs."""


class RecipeError(PearError, ValueError):
    """A recipe that cannot be used; the message says which key and what to do."""


class CheckpointError(PearError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class ScoreError(PearError, RuntimeError):
    """A model, output or interrupted run that scoring cannot use; the message says the way out."""


class EvalError(PearError, RuntimeError):
    """A model, setting or interrupted evaluation that cannot be used; the message says the way out."""


class BuildError(PearError, RuntimeError):
    """Compiled ops that cannot do what they are asked to; the message says how to build them."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# What libraries in C++ and Rust say of it, in words alone.
_FULL_WORDS = (*map(os.strerror, _FULL), "PytorchStreamWriter", "unexpected pos")


_MANY_FILES = os.strerror(errno.EMFILE)


def of_the_system(error: BaseException, place: str | Path | None) -> PearError | None:
    """What to say of an error that a full disk, a quota or a limit brought about; None = it was something else.

    Args:
        error: with its causes, of which libraries make errors of their own.
        place: what was written to, where the error does not say.
    """
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _FULL:
            place = cause.filename or place
            return PearError(_no_room(place, os.strerror(cause.errno)))
        if _MANY_FILES in str(cause):
            return PearError(f"{_MANY_FILES}: a process may not open more; raise its limit (ulimit -n 4096)")
        if words := next((words for words in _FULL_WORDS if words in str(cause)), None):
            reason = words if words in map(os.strerror, _FULL) else "cannot be written to"
            return PearError(_no_room(place, reason))
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _no_room(place: str | Path | None, reason: str) -> str:
    return f"{place or 'the disk'}: {reason}; name another place, or make room there"


def one_sentence(error: BaseException) -> str:
    """The message of an error; of a torch that is not installed, the way out."""
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return "torch is not installed, and everything here needs it: pip install torch, then pear-megatron again"
    return str(error)
