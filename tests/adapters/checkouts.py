"""Tests that run another project's own code need a checkout of it, and what it imports."""

from __future__ import annotations

import importlib.util
import os

import pytest


def needs_checkout(project: str, variable: str, modules: tuple[str, ...]) -> list[pytest.MarkDecorator]:
    """Marks that skip a file, with the reason, where ``variable`` names no checkout or a module is missing."""
    here = pytest.mark.skipif(
        not os.environ.get(variable), reason=f"{variable} names no checkout of {project}"
    )
    return [here, needs_modules(project, modules)]


def needs_modules(project: str, modules: tuple[str, ...]) -> pytest.MarkDecorator:
    """A mark that skips a file, with the reason, where a module is missing."""
    return pytest.mark.skipif(
        any(map(_is_missing, modules)),
        reason=f"{project} imports {', '.join(modules)}, and not all are installed",
    )


def _is_missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True
