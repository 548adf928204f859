"""open_dataset: the run's trajectories, prepared by one rank and mapped by all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pear_megatron.data import DataError, TrajectoryDataset, prepare
from pear_megatron.megatron.layout import Layout
from pear_megatron.recipe import Recipe, RecipeError


def _make_output_dir(output_dir: str) -> RecipeError | None:
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return RecipeError(f"output_dir {output_dir} cannot be made: {error}")
    return None


def open_dataset(recipe: Recipe, layout: Layout) -> TrajectoryDataset:
    """Prepares the data on rank 0 and opens it on every rank; an error there is an error everywhere.

    Raises:
        DataError: what is wrong with the data, file and line.
    """
    outcome: list[Any] = [None]
    if layout.is_main:
        data = recipe.data
        outcome[0] = _make_output_dir(recipe.output_dir)
        if data.cache_dir is None:
            data = data.model_copy(update={"cache_dir": str(Path(recipe.output_dir) / "data_cache")})
        try:
            outcome[0] = outcome[0] or prepare(
                data,
                require_behavior_logprobs=recipe.pear.variant != "none",
                vocab_size=recipe.model.vocab_size,
                progress=True,
            )
        except (DataError, ImportError) as error:
            outcome[0] = error
        except OSError as error:
            outcome[0] = DataError(
                [
                    f"{data.cache_dir}: the prepared data cannot be written ({error}); "
                    "set data.cache_dir to another disk"
                ]
            )
    torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return TrajectoryDataset.open(outcome[0])
