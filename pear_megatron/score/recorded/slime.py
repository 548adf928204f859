"""slime's dumped samples (``Sample.to_dict()``) as JSON, one a row or a dump's list of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import get_integers, get_mask, get_nullable_floats, short
from pear_megatron.score.recorded.answers import Recorded, number, own_fields

_CUT = ("truncated", "aborted", "failed")
# What slime writes; rows may have more.
FIELDS = (
    *("tokens", "response_length", "rollout_log_probs", "loss_mask", "remove_sample", "status", "label"),
    *(
        "index",
        "group_index",
        "rollout_id",
        "weight_versions",
        "rollout_routed_experts",
        "rollout_top_p_token_ids",
    ),
    *("teacher_log_probs", "multimodal_inputs", "multimodal_train_inputs", "generate_function_path"),
    *("train_metadata", "session_id", "non_generation_time", "spec_info", "prefix_cache_info", "samples"),
)
_NOTES = ("prompt", "response", "label", "index", "group_index", "rollout_id", "metadata", "status")


def is_sample(fields: Mapping[str, Any]) -> bool:
    """Whether the row is a sample."""
    return "tokens" in fields and ("response_length" in fields or "rollout_log_probs" in fields)


def from_sample(sample: Mapping[str, Any]) -> Recorded:
    """A sample: ``tokens``, of which the last ``response_length`` were generated, but for loss_mask's zeros."""
    for name in ("tokens", "response_length", "rollout_log_probs"):
        if sample.get(name) is None:
            raise RowProblem(
                f"missing field {name!r}: a sample of slime has tokens, response_length and rollout_log_probs; write "
                "the samples of its dump as they are"
            )
    ids, length = get_integers(sample, "tokens"), sample["response_length"]
    if isinstance(length, bool) or not isinstance(length, int) or not 0 < length < len(ids):
        raise RowProblem(
            f"response_length = {short(length)}, but tokens has {len(ids)} entries, prompt and response; the sample "
            "is empty or damaged, drop it"
        )
    values = get_nullable_floats(sample, "rollout_log_probs")[0]
    mask = np.ones(length, dtype=bool) if sample.get("loss_mask") is None else get_mask(sample, "loss_mask")
    for name, entries in (("rollout_log_probs", len(values)), ("loss_mask", len(mask))):
        if entries != length:
            raise RowProblem(
                f"{name} has {entries} entries and response_length is {length}; the sample is damaged"
            )
    for i, value in enumerate(values):
        number(float(value), f"rollout_log_probs[{i}]")
    context = len(ids) - length
    found: dict[str, Any] = {
        "input_ids": ids,
        "loss_mask": np.concatenate([np.zeros(context, dtype=bool), mask]),
        "behavior_logprobs": np.concatenate([np.zeros(context), values]),
    }
    own = own_fields(sample)
    if _leaves_out(sample):
        own["truncated"] = True
    notes = {name: sample[name] for name in _NOTES if sample.get(name) not in (None, {}, "")}
    return found | own, notes


def _leaves_out(sample: Mapping[str, Any]) -> bool:
    """Whether its response was cut, or slime leaves it out of its own loss: training drops such rows."""
    status = sample.get("status")
    if status is not None and status not in ("completed", *_CUT):
        raise RowProblem(
            f"status = {short(status)}; a generated sample of slime is completed or {', '.join(_CUT)}; drop the row"
        )
    return status in _CUT or sample.get("remove_sample") is True
