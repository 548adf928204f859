"""The base of every configuration object: frozen, validated, and helpful about misspelt keys."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class StrictModel(BaseModel):
    """A pydantic model that refuses unknown keys and names the nearest one it knows.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) on an unknown key or a bad value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _suggest_for_unknown_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key in values:
            if key not in cls.model_fields:
                known = list(cls.model_fields)
                near = _places(cls, _OTHER_NAMES.get(key, key)) or difflib.get_close_matches(
                    str(key), known, n=1, cutoff=0.5
                )
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
        return values


_OTHER_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "num_epochs",
    "epochs": "num_epochs",
}  # other trainers


def _places(model: type[BaseModel], key: Any) -> list[str]:
    """Where the key is one of the model or of a section in it, as dotted keys."""
    if key in model.model_fields:
        return [str(key)]
    sections = [(name, field.annotation) for name, field in model.model_fields.items()]
    return [
        f"{name}.{key}"
        for name, kind in sections
        if isinstance(kind, type) and issubclass(kind, BaseModel) and key in kind.model_fields
    ]


def describe(error: ValidationError, what: str = "recipe") -> str:
    """What is wrong with which keys, in one line; ``what`` stands for the whole."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            message = "this key is required"
        shown = problem["type"] not in ("missing", "value_error")
        lines.append(f"{where or what}: {message}" + (f" (got {problem['input']!r})" if shown else ""))
    return "; ".join(lines)
