"""say_errors: what every command does when what the user gave it is wrong."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, cast

import typer

from pear_megatron.errors import PearError, of_the_system
from pear_megatron.ranks import report_error
from pear_megatron.watch import working

_OF_THE_USER = (
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG
)  # fmt: skip
_Arguments = ParamSpec("_Arguments")


def say_errors(command: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """The command, with errors of the user's making as one line on standard error, and exit code 1."""

    name = command.__module__.rpartition(".")[2].replace("_", "-")  # the function of `eval` has another

    @functools.wraps(command)
    def run(*args: _Arguments.args, **options: _Arguments.kwargs) -> None:
        try:
            with working(f"pear-megatron {name}"):
                command(*args, **options)
                sys.stdout.flush()
        except (PearError, ImportError) as error:
            report_error(error)
            raise typer.Exit(1) from error
        except Exception as error:
            told = of_the_system(error, cast("Path | None", options.get("output"))) or _of_the_user(error)
            if told is None:
                raise
            report_error(told)
            raise typer.Exit(1) from error

    return run


def _of_the_user(error: Exception) -> PearError | None:
    if isinstance(error, OSError) and error.filename is not None and error.errno in _OF_THE_USER:
        return PearError(f"{error.filename}: {error.strerror}; name another place")
    return None
