"""Engine: what runs the RL phase. A new one is a folder here with an ``engine.py``, and a line in ENGINES."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from pear_megatron.errors import RecipeError

# name -> (its module, which has an ENGINE; what --help says of it)
ENGINES = {
    "nemo-rl": ("pear_megatron.rl.nemo_rl.engine", "the checkout that NEMO_RL_DIR names; recipes/grpo"),
    "trl": ("pear_megatron.rl.trl.engine", "here, on one GPU or the CPU; recipes/grpo_trl"),
}


class Engine(Protocol):
    """Someone who runs GRPO from a checkpoint. All methods raise PearError, or ImportError of a missing extra.

    Attributes:
        output: whether it takes, and needs, the folder of the run; else its recipes name one.
    """

    output: bool

    def load_recipe(self, path: Path, overrides: list[str]) -> Any:
        """The settings of a recipe with its parents and ``key=value`` overrides; no checkpoint is looked at."""

    def dry_run(self, path: Path, overrides: list[str], checkpoint: Path) -> str:
        """Checks all that a start would check, and starts nothing; the command or a sentence for standard output."""

    def run(self, path: Path, overrides: list[str], checkpoint: Path, output: Path | None) -> Path | None:
        """Trains, or continues; the Hugging Face folder of the result, unless the engine takes over the process."""


def find_engine(name: str) -> Engine:
    """The engine of that name in ENGINES; RecipeError where there is none."""
    if name not in ENGINES:
        raise RecipeError(f"--engine {name}: there is none of that name; name {' or '.join(ENGINES)}")
    engine: Engine = import_module(ENGINES[name][0]).ENGINE
    return engine
