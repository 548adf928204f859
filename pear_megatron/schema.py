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
                near = difflib.get_close_matches(str(key), list(cls.model_fields), n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
        return values


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
