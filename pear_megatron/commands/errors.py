"""say_errors: what every command does when the user's input is wrong, or the user stops it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from pear_megatron.errors import PearError
from pear_megatron.ranks import is_main, report_error

INTERRUPTED = 130  # as shells have it: 128 + SIGINT

_Arguments = ParamSpec("_Arguments")


def say_errors(command: Callable[_Arguments, None], *, continues: bool) -> Callable[_Arguments, None]:
    """The command, with errors of the user's making and Ctrl-C as one line on standard error instead of a traceback.

    The exit code is 1 after an error, 130 after Ctrl-C.

    Args:
        command: what is run; its options are read from its signature.
        continues: whether the same command goes on where it was stopped.
    """

    @functools.wraps(command)
    def run(*args: _Arguments.args, **options: _Arguments.kwargs) -> None:
        try:
            command(*args, **options)
        except (PearError, ImportError) as error:
            report_error(error)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            if is_main():
                again = "the same command continues" if continues else "the same command starts anew"
                print(f"stopped by Ctrl-C; {again}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error

    return run
