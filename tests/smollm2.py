"""SmolLM2-135M-Instruct for tests: a real model with a real chat template."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.puzzles.smollm2 import find_gguf, make_folder

FOLDER = Path(__file__).parents[1] / "build" / "test-models" / "smollm2"


def gguf_file() -> Path:
    """The file that the folder is made from; skips the test where it is not installed."""
    try:
        return find_gguf()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


def smollm2_folder() -> Path:
    """The folder, made once and kept in build/; skips the test where a package is missing."""
    if not FOLDER.is_dir():
        for package in ("transformers", "gguf", "accelerate"):
            pytest.importorskip(package, reason=f"SmolLM2 needs {package}: pip install 'pear-megatron[hf]'")
        gguf_file()
        make_folder(FOLDER)
    return FOLDER
