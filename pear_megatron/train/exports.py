"""Exports: Hugging Face folders of a run's checkpoints, written while it goes on."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from pear_megatron.errors import CheckpointError
from pear_megatron.hf.assets import ASSETS
from pear_megatron.hf.config_file import config_json
from pear_megatron.megatron.checkpoint.export import export_checkpoint
from pear_megatron.megatron.checkpoint.paths import checkpoint_path
from pear_megatron.megatron.layout import Layout
from pear_megatron.plan.disk import run_disk
from pear_megatron.ranks import from_main
from pear_megatron.recipe import Recipe
from pear_megatron.storage import remove, show_bytes

log = logging.getLogger("pear_megatron")


class Exports:
    """``output_dir/exports/step_N`` of every checkpoint that ``checkpoint.export_interval`` asks for.

    A folder appears whole or not at all. Every rank makes every call; all write.

    Raises:
        RecipeError: no Hugging Face architecture fits the model; before anything is trained.
    """

    def __init__(self, recipe: Recipe, layout: Layout) -> None:
        self.interval, self.layout = recipe.checkpoint.export_interval, layout
        self.output = Path(recipe.output_dir)
        self.folder = self.output / "exports"
        self._total_steps = 0
        if self.interval is None:
            return
        from_main(lambda: config_json(recipe.model, recipe.train.precision, self.output / ASSETS))
        self._size = run_disk(recipe, None).export

    def begin(self, step: int, total_steps: int) -> None:
        """Clears what a killed run left, and exports the checkpoint that it goes on from, where it came not to that."""
        self._total_steps = total_steps
        if self.interval is None:
            return

        def missing() -> bool:
            for path in self.folder.glob(".step_*"):
                remove(path)
            return step > 0 and not self._path(step).is_dir()

        if from_main(missing):
            self(step)

    def __call__(self, step: int) -> None:
        """Exports the checkpoint of a step, where that is asked for.

        Raises:
            CheckpointError: on every rank: it cannot be written; the checkpoint is whole.
        """
        if self.interval is None or (step % self.interval and step != self._total_steps):
            return
        checkpoint = checkpoint_path(self.output / "checkpoints", step)
        from_main(self._make_room)
        try:
            export_checkpoint(checkpoint, self._path(step))
        except CheckpointError as error:
            raise CheckpointError(
                f"{self._path(step)} cannot be exported ({error}); {checkpoint} is whole, and the same command "
                "exports it first when it goes on"
            ) from error
        if self.layout.is_main:
            log.info("exported: %s", self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _make_room(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < self._size:
            raise CheckpointError(
                f"{self.folder}: an export takes {show_bytes(self._size)} and {show_bytes(free)} are free; remove "
                "older ones, or set checkpoint.export_interval=null"
            )
