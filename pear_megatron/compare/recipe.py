"""CompareRecipe: the YAML keys of a comparison: arms x seeds of an offline phase, then the same RL for all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pear_megatron.recipe.load import read_values, validate_as
from pear_megatron.recipe.shipped import recipe_file
from pear_megatron.schema import StrictModel


class OfflineConfig(StrictModel):
    """The offline phase, the same for all arms but for the arm's own overrides.

    Attributes:
        recipe: of ``pear_megatron.train``; a path relative to the file that names it.
        overrides: ``key=value`` for every arm.
        processes: ranks of a run, as torchrun's --nproc-per-node.
    """

    recipe: str
    overrides: list[str] = Field(default=[])
    processes: int = Field(default=1, ge=1)


class RlConfig(StrictModel):
    """GRPO, the same for all arms.

    Attributes:
        recipe: of ``pear-megatron grpo --engine trl``; its data.validation are the problems of the evaluations.
        overrides: ``key=value``.
    """

    recipe: str
    overrides: list[str] = Field(default=[])


class EvalConfig(StrictModel):
    """The evaluations before and after RL; see ``pear-megatron eval``.

    Attributes:
        num_samples: responses to each problem.
        temperature: of sampling.
        batch_size: responses that are drawn at once.
        k: of pass@k; the first one is what the page's texts speak of.
        max_new_tokens: None = the RL recipe's policy.generation.max_new_tokens.
    """

    num_samples: int = Field(default=8, ge=1)
    k: list[int] = Field(default=[1, 8])
    temperature: float = Field(default=1.0, ge=0)
    max_new_tokens: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=64, ge=1)


class TuneConfig(StrictModel):
    """A choice of one key's value for each arm, by the mean reward over RL, on a seed that is then left out.

    Attributes:
        seed: not one of ``seeds``.
        key: of the offline recipe.
        values: tried for every arm that has an offline phase.
    """

    seed: int = Field(ge=0)
    key: str = "optimizer.lr"
    values: list[float] = Field(min_length=2)


class CompareRecipe(StrictModel):
    """One comparison.

    In ``prepare`` and in overrides, ``{seed}`` stands for the seed and ``{prepared}`` for the seed's folder of
    what was prepared.

    Attributes:
        output_dir: everything goes there; the same command continues it.
        prepare: commands that make what a seed's arms start from, run once a seed, in order; ``python`` is this
            one. None = the seeds share model and data, and differ in the order of both phases' batches.
        prepared_dir: None = output_dir/prepared; comparisons with the same commands can share one.
        seeds: a run of every arm for each.
        offline, rl, eval: the three parts of a run.
        arms: name -> overrides of the offline phase; null = no offline phase, RL from where the others start.
        baseline: the arm that the others are compared with.
        tune: None = the recipe's values hold for all arms.
        keep: what a finished cell keeps: its models (export/ and rl/final), or also ``all`` checkpoints of both phases.
        take_off: the reward (mean of 5 steps) at which RL counts as taken off.
    """

    output_dir: str
    prepare: list[str] = Field(default=[])
    prepared_dir: str | None = None
    seeds: list[int] = Field(min_length=1)
    offline: OfflineConfig
    rl: RlConfig
    eval: EvalConfig = EvalConfig()
    arms: dict[str, list[str] | None]
    baseline: str
    tune: TuneConfig | None = None
    keep: Literal["models", "all"] = "models"
    take_off: float = Field(default=0.1, gt=0)

    @field_validator("arms")
    @classmethod
    def _check_names(cls, arms: dict[str, list[str] | None]) -> dict[str, list[str] | None]:
        folders: dict[str, str] = {}
        for name in arms:
            other = folders.setdefault(folder_name(name), name)
            if other != name or not folder_name(name):
                raise ValueError(
                    f"arm {name!r} would share the folder {folder_name(name)!r} with {other!r}; rename one"
                )
        return arms

    @model_validator(mode="after")
    def _check_overrides(self) -> Self:
        """The comparison's own keys win over those of overrides, where they would be ignored."""
        given = {f"arms.{name}": own or [] for name, own in self.arms.items()}
        given |= {"offline.overrides": self.offline.overrides, "rl.overrides": self.rl.overrides}
        for where, overrides in given.items():
            own = ("grpo.seed",) if where == "rl.overrides" else ("seed", "output_dir")
            for override in overrides:
                if override.lstrip("+").partition("=")[0] in own:
                    raise ValueError(
                        f"{where}: {override}: the comparison sets it for every cell (seeds, output_dir); leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.baseline not in self.arms or len(self.arms) < 2:
            raise ValueError(
                f"baseline {self.baseline!r} must be one of at least two arms: {', '.join(self.arms)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} has one twice")
        if self.tune and self.tune.seed in self.seeds:
            raise ValueError(
                f"tune.seed {self.tune.seed} is one of seeds: what was chosen on it would look better there; "
                "take another"
            )
        if self.eval.temperature == 0 and self.eval.num_samples > 1:
            raise ValueError(
                f"eval.temperature 0 gives one response {self.eval.num_samples} times; set num_samples to 1"
            )
        wrong = [k for k in self.eval.k if not 1 <= k <= self.eval.num_samples]
        if wrong or not self.eval.k:
            raise ValueError(
                f"eval.k {self.eval.k}: each is from 1 to eval.num_samples {self.eval.num_samples}"
            )
        return self

    @property
    def prepared_root(self) -> Path:
        """Folder of the seeds' prepared folders."""
        return Path(self.prepared_dir) if self.prepared_dir else Path(self.output_dir) / "prepared"


def folder_name(arm: str) -> str:
    """An arm's name as a folder's: lower case, one - for each run of other signs."""
    return re.sub(r"[^a-z0-9.]+", "-", arm.lower()).strip("-")


def load_compare_recipe(path: str | Path, overrides: list[str] | None = None) -> CompareRecipe:
    """Reads a comparison, its parents and ``key=value`` overrides.

    A path in offline.recipe or rl.recipe is relative to the file that names it; in an override, to ``path``.
    ``pear:NAME`` is a recipe that comes with the package.
    """
    file = Path(path)
    values: Any = read_values(file, overrides, paths=("offline.recipe", "rl.recipe"), folder="compare")
    for part in ("offline", "rl"):
        section = values.get(part) if isinstance(values, dict) else None
        if isinstance(section, dict) and isinstance(section.get("recipe"), str):
            section["recipe"] = str(recipe_file(section["recipe"], base=file.resolve().parent))
    return validate_as(CompareRecipe, file, values)
