"""Settings: which data and which ``pear:`` section are looked at, from a recipe or the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_megatron.config import PearConfig
from pear_megatron.data import DataConfig
from pear_megatron.errors import RecipeError

_COMMAND_LINE = Path("command line")


@dataclass(frozen=True)
class Settings:
    """What one `inspect` command looks at.

    Attributes:
        data: files, length and tokenizer.
        pear: the weights' settings.
        vocab_size: of the policy; None takes the tokenizer's.
        dtype: ``bf16`` or ``fp32``, as training computes; None where no recipe says it.
    """

    data: DataConfig
    pear: PearConfig
    vocab_size: int | None
    dtype: str | None


def read_settings(
    files: list[str],
    overrides: list[str],
    *,
    recipe: Path | None,
    model: str | None,
    tokenizer: str | None,
    seq_length: int,
    text: Mapping[str, Any],
) -> Settings:
    """Puts a recipe, or the defaults, and the command line together.

    Args:
        files: of trajectories; none = the recipe's.
        overrides: ``key=value``; without a recipe of ``pear:`` alone.
        model: the policy; its tokenizer serves where nothing else names one.
        seq_length: ``data.seq_length`` without a recipe.
        text: other keys of ``data:`` that the command line gives: chat_template, ...
    """
    facts = None
    if model is not None:
        from pear_megatron.megatron.checkpoint.model_folder import read_model_facts
        from pear_megatron.score.backends import choose_backend

        choose_backend(model)  # says what is wrong with the folder
        facts = read_model_facts(model)
    fallback = facts.tokenizer if facts is not None else None
    if recipe is not None:
        from pear_megatron.recipe import load_recipe

        missing = {"output_dir": "."} | ({"data": {"train": files}} if files else {})
        read = load_recipe(recipe, overrides, missing=missing)
        changes = {**text, **({"train": files, "blend_by": "trajectories"} if files else {})}
        tokenizer = tokenizer or read.data.tokenizer or fallback
        data = read.data.model_copy(update={**changes, "tokenizer": tokenizer})
        return Settings(data, read.pear, read.model.vocab_size, read.train.precision)
    if not files:
        raise RecipeError(
            "no data: name JSONL or Parquet files, or a recipe that does (--config RECIPE.yaml)"
        )
    data = DataConfig(train=files, seq_length=seq_length, tokenizer=tokenizer or fallback, **text)
    return Settings(data, _pear(overrides), facts.vocab_size if facts is not None else None, None)


def _pear(overrides: list[str]) -> PearConfig:
    """PearConfig's defaults with ``pear.KEY=VALUE``."""
    from omegaconf import OmegaConf

    from pear_megatron.recipe.load import validate_as

    for override in overrides:
        if not override.startswith("pear."):
            raise RecipeError(
                f"override {override}: without --config RECIPE.yaml only pear.KEY=VALUE can be given"
            )
    values = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    assert isinstance(values, dict)
    return validate_as(PearConfig, _COMMAND_LINE, values.get("pear", {}))
