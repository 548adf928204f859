"""ENGINE: NeMo-RL, started in its checkout."""

from __future__ import annotations

import sys
from pathlib import Path

from pear_megatron.recipe.shipped import NEMO_RL, recipe_file
from pear_megatron.rl.engine import Engine
from pear_megatron.rl.nemo_rl.config import Composed, compose, find_checkout
from pear_megatron.rl.nemo_rl.launch import Launch, prepare


class NemoRl:
    """See ``Engine``. Its command replaces this process."""

    output = False  # checkpointing.checkpoint_dir

    def load_recipe(self, path: Path, overrides: list[str]) -> Composed:
        """See ``Engine``."""
        return compose(find_checkout(), recipe_file(path, NEMO_RL), overrides)

    def dry_run(self, path: Path, overrides: list[str], checkpoint: Path) -> str:
        """See ``Engine``: one line for a shell."""
        return self._prepare(path, overrides, checkpoint).shell()

    def run(self, path: Path, overrides: list[str], checkpoint: Path, output: Path | None) -> None:
        """See ``Engine``."""
        self._prepare(path, overrides, checkpoint).run()

    def _prepare(self, path: Path, overrides: list[str], checkpoint: Path) -> Launch:
        launch = prepare(recipe_file(path, NEMO_RL), checkpoint, overrides)
        for key, old, new in launch.recipe.differences():
            print(f"  {key}: {new!r} (NeMo-RL: {old!r})", file=sys.stderr)
        print(launch.sizes, file=sys.stderr)
        for note in launch.notes:
            print(f"note: {note}", file=sys.stderr)
        return launch


ENGINE: Engine = NemoRl()
