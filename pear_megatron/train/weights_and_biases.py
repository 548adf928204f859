"""WandbLog: a run's metrics in Weights & Biases, under one id for as long as the run's folder lives."""

from __future__ import annotations

import importlib.util
import os
import uuid
from pathlib import Path

from pear_megatron.ranks import from_main
from pear_megatron.recipe import Recipe, RecipeError
from pear_megatron.storage import write_atomically

RUN_ID = "wandb_run_id.txt"


def check_wandb(recipe: Recipe) -> None:
    """Refuses a recipe that wants W&B where it is not installed; cheap, for every rank.

    Raises:
        RecipeError: names the key and what to install.
    """
    if recipe.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise RecipeError(
            f"logging.wandb_project is {recipe.logging.wandb_project!r} and wandb is not installed; "
            "pip install 'pear-megatron[wandb]', or leave the key out"
        )


def start_wandb(recipe: Recipe) -> WandbLog | None:
    """The W&B run on rank 0, where the recipe wants one; its error is every rank's."""
    started: list[WandbLog] = []
    if recipe.logging.wandb_project:
        from_main(lambda: started.append(WandbLog(Path(recipe.output_dir), recipe)))
    return started[0] if started else None


class WandbLog:
    """The W&B run of an ``output_dir``; a continued run goes on under the same id.

    W&B's own environment variables hold: WANDB_MODE=offline keeps everything in ``output_dir/wandb``. The recipe's
    resolved values become the W&B run's config.

    Raises:
        RecipeError: W&B cannot be started: not logged in, not reachable, or not whole.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        project = recipe.logging.wandb_project
        folder.mkdir(parents=True, exist_ok=True)
        try:
            import wandb

            self._run = wandb.init(
                project=project,
                name=recipe.logging.wandb_name or folder.name,
                id=_run_id(folder),
                resume="allow",
                dir=str(folder),
                config=recipe.model_dump(mode="json"),
            )
        except Exception as error:  # also pydantic's, of a WANDB_ variable, and a broken installation's
            said = " ".join(str(error).split())
            raise RecipeError(
                f"logging.wandb_project {project}: W&B cannot be started: {said}; run `wandb login`, set "
                "WANDB_API_KEY or WANDB_MODE=offline, or leave the key out"
            ) from error
        # Steps that are trained again after a crash are logged again: W&B's own count must not be the axis.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Records one step."""
        self._run.log({"step": step, **scalars})

    def close(self, *, failed: bool = False) -> None:
        """Uploads, or writes, what is left, and tells W&B how the run ended."""
        self._run.finish(exit_code=int(failed))


def _run_id(folder: Path) -> str:
    path = folder / RUN_ID
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    name = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
    write_atomically(path, name)
    return name
