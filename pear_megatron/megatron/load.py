"""A trained model back from a run's folder, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pear_megatron.megatron import checkpoint
from pear_megatron.megatron.initialize import initialize_weights
from pear_megatron.megatron.layout import Layout, initialize
from pear_megatron.megatron.model import build_model
from pear_megatron.recipe import ParallelConfig, Recipe, RecipeError, TrainConfig


def read_run_recipe(run: str | Path) -> Recipe:
    """The resolved recipe that a run wrote into its folder.

    Raises:
        RecipeError: the folder is not a run's.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise RecipeError(f"{run} is not the folder of a run: it has no config.yaml")
    return Recipe.model_validate(yaml.safe_load(path.read_text()))


def _build_on_one_rank(recipe: Recipe) -> tuple[Any, Layout]:
    """The recipe's model, uninitialised, on TP = PP = 1."""
    train = TrainConfig(micro_batch_size=1, global_batch_size=1, precision=recipe.train.precision)
    layout = initialize(recipe.model, ParallelConfig(), train)
    model = build_model(recipe.model, layout, train)
    return model, layout


def load_run(run: str | Path) -> tuple[Any, Recipe]:
    """The model of a run's newest checkpoint on TP = PP = 1, in evaluation mode, and its recipe.

    Starts a process group of one; ``pear_megatron.megatron.layout.shutdown`` ends it.

    Args:
        run: the run's ``output_dir``, whatever layout it was trained on.

    Raises:
        RecipeError, CheckpointError: the folder holds no run, or no checkpoint.
    """
    recipe = read_run_recipe(run)
    path = checkpoint.resolve(run)
    model, _ = _build_on_one_rank(recipe)
    checkpoint.load(path, model)
    return model.eval(), recipe


def new_model(recipe: Recipe) -> tuple[Any, Layout]:
    """The recipe's model with its initial weights on TP = PP = 1, and the layout (see load_run)."""
    model, layout = _build_on_one_rank(recipe)
    initialize_weights(model, seed=recipe.seed, vocab_size=recipe.model.vocab_size)
    return model, layout
