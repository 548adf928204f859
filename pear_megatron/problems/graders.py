"""Graders: a Python file's ``grade(response, answer, problem)``, loaded by path, and what it returns, checked."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pear_megatron.data.fields import short
from pear_megatron.errors import PearError

Grade = Callable[[str, Any, dict[str, Any]], float]

_SIGNATURE = "def grade(response: str, answer, problem: dict) -> float"


class GraderError(PearError, RuntimeError):
    """A grader that cannot be loaded, raised, or returned no finite number; names the file and the problem."""


def load_grader(path: str | Path) -> Grade:
    """The function ``grade`` of a Python file. Modules beside the file can be imported at its top."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise GraderError(f"no grader at {path}; write a Python file with `{_SIGNATURE}` and name it")
    name = f"pear_megatron_grader_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise GraderError(f"the grader {path} is no Python file; name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise GraderError(
            f"{_line_in(path, error)}: the grader cannot be imported: {_in_words(error)}"
        ) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    grade = getattr(module, "grade", None)
    if not callable(grade):
        raise GraderError(f"{path} has no function grade; add `{_SIGNATURE}`")
    try:
        inspect.signature(grade).bind("response", "answer", {})
    except TypeError as error:
        raise GraderError(
            f"{path}: grade cannot be called with three arguments ({error}); it is `{_SIGNATURE}`"
        ) from error
    except ValueError:  # a callable without a signature
        pass
    return grade  # type: ignore[no-any-return]


def checked_score(score: Callable[[], Any], source: str | Path, problem: str, response: str) -> float:
    """What ``score`` returns, as a finite float (True is 1); the rest is for GraderError's message."""
    try:
        value = score()
    except (Exception, SystemExit) as error:
        raise GraderError(
            f"{_line_in(source, error)}: grade raised {_in_words(error)} on problem {problem}, response "
            f"{short(response)}; a response that cannot be read should score 0"
        ) from error
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise GraderError(
            f"{source}: grade returned {short(value)} on problem {problem}, response {short(response)}; it must "
            "return a finite number, 0 for a wrong answer"
        )
    return number


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _line_in(source: str | Path, error: BaseException) -> str:
    """FILE:LINE of the innermost frame of an error that lies in the grader's own file."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{source}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == Path(source).name]
    return f"{source}:{lines[-1]}" if lines else str(source)
