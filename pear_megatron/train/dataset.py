"""open_dataset: the run's trajectories, prepared by one rank and mapped by all."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pear_megatron.data import DataError, TrajectoryDataset, prepare
from pear_megatron.ranks import from_main
from pear_megatron.recipe import Recipe, RecipeError


def open_dataset(recipe: Recipe) -> TrajectoryDataset:
    """Prepares the data on rank 0 and opens it on every rank; an error there is an error everywhere.

    Raises:
        DataError: what is wrong with the data, file and line.
    """
    return TrajectoryDataset.open(from_main(partial(_prepare, recipe)))


def _prepare(recipe: Recipe) -> Path:
    data = recipe.data
    try:
        Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output_dir {recipe.output_dir} cannot be made: {error}") from error
    if data.cache_dir is None:
        data = data.model_copy(update={"cache_dir": str(Path(recipe.output_dir) / "data_cache")})
    try:
        return prepare(
            data,
            require_behavior_logprobs=recipe.pear.variant != "none",
            vocab_size=recipe.model.vocab_size,
            progress=True,
        )
    except ImportError as error:
        raise DataError([str(error)]) from error
    except OSError as error:
        raise DataError(
            [
                f"{data.cache_dir}: the prepared data cannot be written ({error}); set data.cache_dir to another disk"
            ]
        ) from error
