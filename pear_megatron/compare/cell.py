"""Cell: one arm on one seed, with its recipes resolved: all that determines its result."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pear_megatron.compare.recipe import CompareRecipe, folder_name
from pear_megatron.errors import RecipeError
from pear_megatron.recipe import Recipe, load_recipe
from pear_megatron.rl.engine import find_engine
from pear_megatron.storage import check_same_settings, read_settings, write_atomically

RL_ENGINE = "trl"
_FILE = "cell.json"
# What changes no number: a cell that is there stays as it is under another value.
_MAY_CHANGE = (
    "offline.checkpoint.save_interval",
    "offline.checkpoint.keep_last",
    "offline.checkpoint.async_save",
    "offline.logging.",
    "offline.train.log_interval",
    "rl.checkpointing.",
)


@dataclass(frozen=True)
class Cell:
    """One arm on one seed.

    Attributes:
        recipe: the comparison.
        arm, seed: which one.
        folder: run/, export/, before/, rl/, after/ and their logs go there.
        chosen: overrides that tuning chose, or tries.
        evaluated: False = RL alone, without evaluations (tuning).
    """

    recipe: CompareRecipe
    arm: str
    seed: int
    folder: Path
    chosen: tuple[str, ...] = ()
    evaluated: bool = True

    @property
    def prepared(self) -> Path:
        """What the seed's commands made."""
        return self.recipe.prepared_root / f"seed{self.seed}"

    @property
    def has_offline_phase(self) -> bool:
        """False for the arm that RL starts without one."""
        return self.recipe.arms[self.arm] is not None

    @cached_property
    def offline_overrides(self) -> list[str]:
        """The arguments of pear_megatron.train after --config."""
        own = self.recipe.arms[self.arm] or []
        overrides = [*self.recipe.offline.overrides, *own]
        fixed = [f"seed={self.seed}", f"output_dir={self.folder / 'run'}"]
        return [*fill(overrides, self.seed, self.prepared), *self.chosen, *fixed]

    @cached_property
    def rl_overrides(self) -> list[str]:
        """The overrides of the RL recipe; of its checkpoints the last is all that a cell reads."""
        kept = [] if self.recipe.keep == "all" else ["checkpointing.keep_last=1"]
        return [*fill(self.recipe.rl.overrides, self.seed, self.prepared), *kept, f"grpo.seed={self.seed}"]

    @cached_property
    def offline(self) -> Recipe:
        """The offline phase; of an arm without one, what it would have started from."""
        return load_recipe(self.recipe.offline.recipe, self.offline_overrides)

    @cached_property
    def rl(self) -> Any:
        """The engine's settings."""
        return find_engine(RL_ENGINE).load_recipe(Path(self.recipe.rl.recipe), self.rl_overrides)

    @property
    def max_new_tokens(self) -> int:
        """Of the evaluations."""
        wanted: int | None = self.recipe.eval.max_new_tokens or self.rl.policy.generation.max_new_tokens
        if wanted is None:
            raise RecipeError(
                "eval.max_new_tokens is not given, and the RL recipe has no policy.generation.max_new_tokens"
            )
        return wanted

    def describe(self) -> dict[str, Any]:
        """All that determines the result, as JSON has it."""
        offline = self.offline.model_dump(mode="json") if self.has_offline_phase else None
        evaluation = self.recipe.eval.model_dump(mode="json", exclude={"batch_size"})
        content = {
            "offline": offline,
            "rl": self.rl.model_dump(mode="json"),
            "eval": evaluation if self.evaluated else None,
        }
        described: dict[str, Any] = json.loads(json.dumps(content))
        return described

    def claim(self) -> None:
        """Makes the folder this cell's own; RecipeError if it holds one with other settings."""
        described, path = self.describe(), self.folder / _FILE
        if path.is_file():
            check_same_settings(
                str(self.folder),
                read_settings(path),
                described,
                may_change=_MAY_CHANGE,
                way_out="choose another output_dir, or remove that folder to run it anew",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(described, indent=1) + "\n")

    @property
    def name(self) -> str:
        """What messages call it."""
        tried = f" ({', '.join(self.chosen)})" if self.chosen and not self.evaluated else ""
        return f"{self.arm}, seed {self.seed}{tried}"


def fill(texts: list[str], seed: int, prepared: Path) -> list[str]:
    """``{seed}`` and ``{prepared}`` filled in; other braces stay, for Hydra's dictionaries."""
    return [text.replace("{seed}", str(seed)).replace("{prepared}", str(prepared)) for text in texts]


def cells_of(recipe: CompareRecipe, chosen: dict[str, tuple[str, ...]]) -> list[Cell]:
    """Every arm on every seed, seed by seed; ``chosen`` are an arm's tuned overrides."""
    root = Path(recipe.output_dir)
    return [
        Cell(recipe, arm, seed, root / f"seed{seed}" / folder_name(arm), chosen.get(arm, ()))
        for seed in recipe.seeds
        for arm in recipe.arms
    ]


def all_cells(recipe: CompareRecipe) -> list[Cell]:
    """All that is run, the cells of tuning last; those before have the settings that they have without it."""
    tried = [cell for by_value in tuning_cells(recipe).values() for cell in by_value.values()]
    return [*cells_of(recipe, {}), *tried]


def tuning_cells(recipe: CompareRecipe) -> dict[str, dict[float, Cell]]:
    """For each arm with an offline phase, the value tried -> its cell; empty without ``tune``."""
    tune, root = recipe.tune, Path(recipe.output_dir) / "tune"
    if tune is None:
        return {}
    return {
        arm: {
            value: Cell(
                recipe,
                arm,
                tune.seed,
                root / folder_name(arm) / f"{value:g}",
                (f"{tune.key}={value:g}",),
                evaluated=False,
            )
            for value in tune.values
        }
        for arm, overrides in recipe.arms.items()
        if overrides is not None
    }
