"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pear_megatron.errors import RecipeError


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuses an output folder that holds something, unless it may be overwritten.

    Raises:
        RecipeError: it is there, or is no folder.
    """
    if path.exists() and not path.is_dir():
        raise RecipeError(f"--output {path} is a file; name a new folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise RecipeError(
            f"--output {path} is not empty; name a new folder (readers like NeMo-RL cache by path), or replace it "
            "with --overwrite"
        )


def partial_of(path: Path) -> Path:
    """The folder beside ``path`` that is written first."""
    return path.absolute().with_name(f".{path.absolute().name}.partial")


def publish(path: Path) -> None:
    """Puts the written folder in the place of ``path``, and what was there away."""
    old = path.absolute().with_name(f".{path.absolute().name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(partial_of(path), path)
    shutil.rmtree(old, ignore_errors=True)
