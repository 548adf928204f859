"""Where a run goes on: the newest of its checkpoints that can be read, agreed on by all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pear_megatron.errors import CheckpointError
from pear_megatron.megatron.checkpoint import state as checkpoint
from pear_megatron.megatron.checkpoint.paths import checkpoint_path, whole_steps
from pear_megatron.megatron.layout import Layout
from pear_megatron.ranks import from_main, together
from pear_megatron.recipe import Recipe, RecipeError
from pear_megatron.train.run_folder import check_same_run

log = logging.getLogger("pear_megatron")


def find(recipe: Recipe, root: Path) -> list[int]:
    """Steps of the run's whole checkpoints, best first; none = a new run.

    Raises:
        RecipeError: the recipe does not continue the run, or was told not to.
        CheckpointError: there are checkpoints and all are damaged.
    """

    def look() -> list[int]:
        steps = whole_steps(root)
        if steps and not recipe.checkpoint.resume:
            raise RecipeError(
                f"output_dir {recipe.output_dir} holds a run at step {steps[0]} and checkpoint.resume is "
                "false; choose another output_dir, or remove that folder to start anew"
            )
        if steps:
            check_same_run(Path(recipe.output_dir), recipe)
        return steps

    return from_main(look)


def read(recipe: Recipe, root: Path, steps: list[int]) -> tuple[list[int], dict[str, Any]]:
    """The steps from the first readable checkpoint on, and what that one says of the run's data, ``data``.

    Raises:
        CheckpointError: none can be read, it is not a run's, or its optimizer cannot be gone on with.
    """
    found: list[dict[str, Any]] = []
    used = _first(root, steps, lambda path: found.append(checkpoint.read_common(path)))
    if "data" not in found[-1]:
        raise CheckpointError(
            f"{checkpoint_path(root, used)} holds a model and no run to go on with; start from it with "
            "checkpoint.pretrained and another output_dir"
        )
    key, now = "use_distributed_optimizer", recipe.parallel.use_distributed_optimizer
    if found[-1][key] != now:
        raise CheckpointError(
            f"{checkpoint_path(root, used)} was written with parallel.{key} {str(not now).lower()}, which "
            f"Megatron-Core does not turn into the state of the other optimizer; resume with {str(not now).lower()}"
        )
    return steps[steps.index(used) :], found[-1]["data"]


def load(root: Path, steps: list[int], layout: Layout, model: Any, optimizer: Any, scheduler: Any) -> int:
    """Loads the first checkpoint that can be loaded -> its step.

    Raises:
        CheckpointError: none can.
    """
    step = _first(root, steps, lambda path: checkpoint.load(path, model, optimizer, scheduler, layout))
    log.info("resuming from %s", checkpoint_path(root, step))
    return step


def _first(root: Path, steps: list[int], attempt: Callable[[Path], Any]) -> int:
    """The first step whose checkpoint lets every rank through ``attempt``."""
    first: CheckpointError | None = None
    for step in steps:
        try:
            together(partial(attempt, checkpoint_path(root, step)))
        except CheckpointError as error:
            log.warning("skipping a checkpoint: %s", error)
            first = first or error
        else:
            return step
    assert first is not None
    raise first
