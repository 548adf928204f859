"""ENGINE: TRL's GRPOTrainer, in this process."""

from __future__ import annotations

from pathlib import Path

from pear_megatron.rl.engine import Engine
from pear_megatron.rl.trl.recipe import TrlRecipe, load_trl_recipe


class Trl:
    """See ``Engine``."""

    output = True

    def load_recipe(self, path: Path, overrides: list[str]) -> TrlRecipe:
        """See ``Engine``."""
        return load_trl_recipe(path, overrides)

    def dry_run(self, path: Path, overrides: list[str], checkpoint: Path) -> str:
        """See ``Engine``: reads the recipe, the checkpoint's files and the problems."""
        from pear_megatron.megatron.checkpoint.model_folder import check_model_folder
        from pear_megatron.rl.trl.grpo import training_problems

        recipe = self.load_recipe(path, overrides)
        model, problems = check_model_folder(checkpoint), training_problems(recipe.data)
        return (
            f"{recipe.grpo.max_num_steps} steps of {recipe.grpo.num_prompts_per_step} x "
            f"{recipe.grpo.num_generations_per_prompt} rollouts on {len(problems)} problems, from {model}"
        )

    def run(self, path: Path, overrides: list[str], checkpoint: Path, output: Path | None) -> Path:
        """See ``Engine``."""
        from pear_megatron.rl.trl.grpo import run

        assert output is not None
        return run(self.load_recipe(path, overrides), checkpoint, output)


ENGINE: Engine = Trl()
