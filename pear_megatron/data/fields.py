"""The fields a row may have, and the types of their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from pear_megatron.data.errors import RowProblem

# The ways to give the tokens of a trajectory; a row uses one.
FORMS = (("input_ids", "loss_mask"), ("messages",), ("conversations",), ("prompt", "response"))
OF_TEXT = ("tools", "documents", "chat_template_kwargs")  # what a chat template is given beside the text
# Other programs' names beside text: of the system message, and of tools in OpenAI's old form.
SYSTEM, FUNCTIONS = ("system", "system_prompt"), "functions"
_MAX_FLOAT32 = 3.4e38
KNOWN_FIELDS = (
    *(name for form in FORMS for name in form),
    *OF_TEXT,
    "token_weights",
    "behavior_logprobs",
    "behavior_topk_ids",
    "behavior_topk_logprobs",
    "reference_logprobs",
    "policy_logprobs",
    "reward",
    "id",
    "tokenizer_hash",
    "temperature",
    "truncated",
    "metadata",
)


def get_number(fields: Mapping[str, Any], name: str, default: float) -> float:
    """A number that is finite in float32, or ``default`` where the field is absent."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _MAX_FLOAT32:
        raise RowProblem(f"{name} = {value!r} is not a finite number; give one, or leave the field out")
    return float(value)


def get_flag(fields: Mapping[str, Any], name: str) -> bool:
    """A boolean, False where the field is absent."""
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise RowProblem(f"{name} = {value!r} is not a boolean; write true or false")
    return value


def get_text(fields: Mapping[str, Any], name: str) -> str:
    """A string that must be there."""
    value = fields[name]
    if not isinstance(value, str):
        raise RowProblem(f"{name} = {short(value)} is a {type(value).__name__}; it must be a string")
    return value


def check_encodable(name: str, text: str) -> None:
    """Raise RowProblem on text that no file can hold: JSON's ``\\ud83d`` alone is half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowProblem(
            f"{name} = {short(text)} holds half a character (a lone surrogate); write the whole of it, or take it out"
        ) from None


def get_system(fields: Mapping[str, Any]) -> str | None:
    """The system message that stands in a column of its own; None where there is none, or an empty one."""
    found = {name: fields[name] for name in SYSTEM if fields.get(name)}
    for name, text in found.items():
        if not isinstance(text, str):
            raise RowProblem(
                f"{name} = {short(text)} is a {type(text).__name__}; it must be a string, or the first message, of "
                "role system (a 'prompt' can be a list of messages)"
            )
        check_encodable(name, text)
    if len(set(found.values())) > 1:
        raise RowProblem(f"{' and '.join(found)} are different texts; keep one")
    return next(iter(found.values()), None)


def get_integers(fields: Mapping[str, Any], name: str) -> np.ndarray:
    """A list of integers, as int64 [n]."""
    values = _flat_list(fields[name], name, {int}, "a list of integers")
    try:
        return np.asarray(values, dtype=np.int64)
    except OverflowError:
        raise RowProblem(f"{name} holds {max(values, key=abs)}, which is too large for a token id") from None


def vocabulary(size: int | None) -> str:
    """Where a token id is that no vocabulary of this size has; None = the size is not known."""
    if size is None:
        return "no token id, which is from 0 up to what 32 bits hold"
    return f"outside the vocabulary of {size} (0 to {size - 1})"


def get_mask(fields: Mapping[str, Any], name: str) -> np.ndarray:
    """A list of 0/1 or true/false, as bool [n]."""
    wanted = "1 or true on decisions, 0 or false elsewhere"
    array = np.asarray(_flat_list(fields[name], name, {bool, int, float}, wanted))
    wrong = np.flatnonzero((array != 0) & (array != 1))
    if len(wrong):
        value = np.asarray(array[wrong[0]]).item()  # integers beyond 64 bits are no numpy scalars
        raise RowProblem(
            f"{name}[{wrong[0]}] = {value!r}; it must be {wanted} (weights go into 'reward', one per row, or "
            "'token_weights')"
        )
    return array.astype(bool)


def get_nullable_floats(fields: Mapping[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A list of numbers and nulls, as (float64 [n] with NaN for null, bool [n] True where null)."""
    values = _flat_list(fields[name], name, {int, float, type(None)}, "a list of numbers or null")
    if isinstance(values, np.ndarray):
        if values.dtype == np.float16:
            raise RowProblem(f"{name} is float16, {HALF_WAY_OUT}")
        return values.astype(np.float64), np.zeros(len(values), dtype=bool)
    return np.array(values, dtype=np.float64), np.array([value is None for value in values], dtype=bool)


@dataclass(frozen=True, eq=False)
class Ragged:
    """A list of lists of numbers; null is an empty list.

    Attributes:
        values: [lengths.sum()], end to end.
        lengths: int64 [n].
    """

    values: np.ndarray
    lengths: np.ndarray

    def of(self, chosen: np.ndarray) -> np.ndarray:
        """The values of the lists where ``chosen``, bool [n], is True, end to end."""
        return self.values[np.repeat(chosen, self.lengths)]


def get_ragged(fields: Mapping[str, Any], name: str, kind: type[int] | type[float]) -> Ragged:
    """A list with a list of numbers, or null, per token; values as int64 or float64."""
    wanted = f"a list with a list of {'integers' if kind is int else 'numbers'}, or null, per token"
    value = fields[name]
    if not isinstance(value, Ragged):
        lists = _flat_list(value, name, {list, type(None)}, wanted)
        values = list(chain.from_iterable(filter(None, lists)))
        if not set(map(type, values)) <= {int, kind}:
            for i, one in enumerate(lists):
                _flat_list(one or [], f"{name}[{i}]", {int, kind}, wanted)
        lengths = np.array([len(one or ()) for one in lists], dtype=np.int64)
        try:
            value = Ragged(np.array(values, dtype=np.int64 if kind is int else np.float64), lengths)
        except OverflowError:
            raise RowProblem(f"{name} holds {max(values, key=abs)}, which is too large") from None
    if value.values.dtype == np.float16:
        raise RowProblem(f"{name} is float16, {HALF_WAY_OUT}")
    if value.values.dtype.kind not in ("iu" if kind is int else "iuf"):
        raise RowProblem(f"{name} holds {value.values.dtype}; it must be {wanted}")
    return Ragged(value.values.astype(np.int64 if kind is int else np.float64), value.lengths)


def get_token_weights(fields: Mapping[str, Any], mask: np.ndarray) -> np.ndarray | None:
    """``token_weights`` as float32 [n], 0 off the decisions ``mask``; None where the row has none."""
    name = "token_weights"
    if name not in fields:
        return None
    values, nulls = get_nullable_floats(fields, name)
    if len(values) != len(mask):
        raise RowProblem(f"{name} has {len(values)} entries and input_ids {len(mask)}; write one per token")
    bad = np.flatnonzero(mask & ~(np.abs(values) < _MAX_FLOAT32))
    if len(bad):
        shown = "null" if nulls[bad[0]] else f"{values[bad[0]]:g}"
        raise RowProblem(
            f"{name}[{bad[0]}] = {shown} on a decision; give a finite number, of either sign (0 takes the decision "
            "out of the gradient)"
        )
    return np.where(mask, values, 0.0).astype(np.float32)


HALF_WAY_OUT = (
    "whose rounding is as large as the ratios it is compared in; compute and store float32 "
    "(`pear-megatron score` does)"
)
_NUMPY_KINDS = {"b": bool, "i": int, "u": int, "f": float}


def _flat_list(value: Any, name: str, types: set[type], wanted: str) -> Any:
    """``value`` as it is, if it is a list whose items have exactly these types, or such an array."""
    if isinstance(value, np.ndarray):
        if _NUMPY_KINDS.get(value.dtype.kind) in types:
            return value
        value = value.tolist()
    if not isinstance(value, list):
        raise RowProblem(f"{name} = {short(value)} is a {type(value).__name__}; it must be {wanted}")
    if not set(map(type, value)) <= types:
        i = next(i for i, item in enumerate(value) if type(item) not in types)
        raise RowProblem(f"{name}[{i}] = {short(value[i])}; it must be {wanted}")
    return value


def parsed(value: Any) -> Any:
    """What JSON says that is kept as text, as a Parquet column has it; any other value as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value


def short(value: Any) -> str:
    """repr, cut to what fits into a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
