"""behavior_logprobs and reference_logprobs: what a policy gave each token, checked as far as numbers can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pear_megatron.data.columns import REFERENCE
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import get_nullable_floats

# Field -> (what it is for, the way out).
_WAYS_OUT = {
    "behavior_logprobs": (
        "PEAR's weights come from it, and pear.negative_floor counts from it",
        "write it with `pear-megatron score`, or train plain SFT (pear.variant=none, without pear.negative_floor)",
    ),
    REFERENCE: (
        "pear.ratio=reference and pear.dft_policy=reference take it",
        "write it with `pear-megatron score --as reference` and the model that training starts from, or leave these "
        "settings out",
    ),
}
_LEAST_LOGPROB = -1000.0  # below it no token was ever sampled: engines write -9999 where they have none
_POSITIVE_TOLERANCE = 1e-5  # what rounding leaves of log 1; such values become 0
_MIN_DECISIONS_TO_SUSPECT_ZEROS = 4
_MIN_VALUES_TO_SUSPECT_HALF = 16


def read_logprobs(
    fields: Mapping[str, Any],
    mask: np.ndarray,
    source: str,
    *,
    required: bool,
    name: str = "behavior_logprobs",
) -> np.ndarray:
    """The row's log-probs, float32 [n], at most 0, and 0 off the decisions.

    Args:
        fields: the row; a missing field gives zeros where ``required`` is False.
        mask: bool [n], the decisions; elsewhere null or any finite number will do.
        source: what the n tokens came from, for the message.
        required: False where the loss does without (plain SFT).
        name: of the field, ``behavior_logprobs`` or ``reference_logprobs``.

    Raises:
        RowProblem: missing, not one per token, null on a decision, not finite, positive, or never filled in
            (docs/method.md, Where it goes wrong).
    """
    if name not in fields:
        if required:
            raise RowProblem(f"missing field {name!r}: {'; '.join(_WAYS_OUT[name])}")
        return np.zeros(len(mask), dtype=np.float32)
    values, nulls = get_nullable_floats(fields, name)
    if len(values) != len(mask):
        raise RowProblem(
            f"{name} has {len(values)} entries and {source} {len(mask)}; entry i belongs to token i of the "
            "whole trajectory, prompt included (null or 0 there); align or score it again"
        )
    with np.errstate(over="ignore"):
        logprobs = np.where(nulls, 0.0, values).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(logprobs) | (nulls & mask))
    if len(bad):
        i = bad[0]
        shown = "null on a decision" if nulls[i] else f"{values[i]}, not finite"
        raise RowProblem(f"{name}[{i}] = {shown}; drop the row, or score it again")
    absent = np.flatnonzero((logprobs < _LEAST_LOGPROB) & mask)
    if len(absent):
        i = absent[0]
        raise RowProblem(
            f"{name}[{i}] = {values[i]:g}, which engines write where they have no log-probability; drop the row, or "
            "score it again"
        )
    positive = np.flatnonzero((logprobs > _POSITIVE_TOLERANCE) & mask)
    if len(positive):
        i = positive[0]
        raise RowProblem(
            f"{name}[{i}] = {values[i]:g} is positive, so it is no log-probability; store log p (not p, not "
            "-log p)"
        )
    decisions = logprobs[mask]
    if required and len(decisions) >= _MIN_DECISIONS_TO_SUSPECT_ZEROS and not decisions.any():
        raise RowProblem(
            f"{name} is 0 on all {len(decisions)} decisions, as if it had never been filled in; "
            f"{_WAYS_OUT[name][1]}"
        )
    return np.where(mask, np.minimum(logprobs, 0.0), 0.0).astype(np.float32)


def looks_half(decisions: np.ndarray) -> bool:
    """Whether float32 values [k] are all such that float16 or bfloat16 holds them; False if k is small."""
    if len(np.unique(decisions)) < _MIN_VALUES_TO_SUSPECT_HALF:
        return False
    if not (decisions.view(np.uint32) & 0xFFFF).any():  # the bits that bfloat16 does not have
        return True
    with np.errstate(over="ignore"):
        return bool(np.array_equal(decisions, decisions.astype(np.float16).astype(np.float32)))
