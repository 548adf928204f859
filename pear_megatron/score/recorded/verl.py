"""verl's rollouts: fields of a DataProto, one sample a row, or an agent loop's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import get_integers, get_mask, get_nullable_floats
from pear_megatron.score.recorded.answers import Recorded, number, own_fields

# What the same thing is called in a DataProto and in an agent loop's output.
_NAMES = {
    "prompts": ("prompts", "prompt_ids"),
    "responses": ("responses", "response_ids"),
    "response_mask": ("response_mask",),
    "rollout_log_probs": ("rollout_log_probs", "response_logprobs"),
}
# What verl writes; rows may have more.
FIELDS = (
    *(name for names in _NAMES.values() for name in names),
    *("attention_mask", "reward_score", "score", "token_level_scores", "rm_scores", "token_level_rewards"),
    *("uid", "data_source", "request_id", "num_turns", "__num_turns__", "ground_truth", "input_ids"),
    *("position_ids", "old_log_probs", "ref_log_prob", "entropys", "values", "advantages", "returns"),
    *("raw_prompt", "raw_prompt_ids", "reward_model", "extra_info", "ability", "index", "agent_name"),
    *("tools_kwargs", "interaction_kwargs", "multi_modal_data", "multi_modal_inputs", "metrics", "meta_info"),
    *("extra_fields", "routed_experts", "input", "output", "gts", "step"),
)
_NOTES = ("uid", "data_source", "request_id", "num_turns", "ground_truth")
_DUMP = ("input", "output", "score", "step")


def is_rollout(fields: Mapping[str, Any]) -> bool:
    """Whether the row is a rollout of verl, or the text that it dumps of one."""
    dumped = all(name in fields for name in _DUMP) and isinstance(fields["output"], str)
    return dumped or any(name in fields for name in _NAMES["responses"])


def from_rollout(fields: Mapping[str, Any]) -> Recorded:
    """``prompts``, ``responses``, ``response_mask`` and ``rollout_log_probs``; attention_mask where they are padded."""
    found = {
        name: next((known for known in names if known in fields), None) for name, names in _NAMES.items()
    }
    missing = [name for name, known in found.items() if known is None]
    if len(missing) == len(_NAMES):
        raise RowProblem(
            "verl's rollout_data_dir holds text alone (input, output, score): no token ids, no log-probs, and special "
            "tokens taken out. Save prompts, responses, response_mask, rollout_log_probs and attention_mask of the "
            "DataProto as lists, a row a sample (actor_rollout_ref.rollout.calculate_log_probs=true)"
        )
    if missing:
        raise RowProblem(f"missing field {missing[0]!r}: a rollout of verl needs {', '.join(_NAMES)}; add it")
    prompt, response = (get_integers(fields, str(found[name])) for name in ("prompts", "responses"))
    mask = get_mask(fields, str(found["response_mask"]))
    values = get_nullable_floats(fields, str(found["rollout_log_probs"]))[0]
    for name, entries in (("response_mask", len(mask)), (found["rollout_log_probs"], len(values))):
        if entries != len(response):
            raise RowProblem(
                f"{name} has {entries} entries and {found['responses']} {len(response)}; one per token"
            )
    keep = _not_padding(fields, prompt, response)
    mask &= keep[len(prompt) :]
    for i in np.flatnonzero(mask):
        number(float(values[i]), f"{found['rollout_log_probs']}[{i}]")
    off = np.zeros(len(prompt), dtype=bool)
    row = {
        "input_ids": np.concatenate([prompt, response])[keep],
        "loss_mask": np.concatenate([off, mask])[keep],
        "behavior_logprobs": np.concatenate([np.zeros(len(prompt)), values])[keep],
    }
    notes = {name: fields[name] for name in _NOTES if name in fields}
    return row | _reward(fields) | own_fields(fields), notes


def _not_padding(fields: Mapping[str, Any], prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """bool [prompt + response]: prompts are padded on the left, responses on the right."""
    count = len(prompt) + len(response)
    if "attention_mask" in fields:
        keep = get_mask(fields, "attention_mask")
        if len(keep) != count:
            raise RowProblem(
                f"attention_mask has {len(keep)} entries, prompt and response {count}; one per token"
            )
        return keep
    if len(prompt) > 1 and prompt[0] == prompt[1]:
        raise RowProblem(
            f"the prompt begins with token {prompt[0]} twice, as padding does; add attention_mask, which says what is "
            "padding"
        )
    return np.ones(count, dtype=bool)


def _reward(fields: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("reward_score", "score"):
        if name in fields:
            return {"reward": fields[name]}
    for name in ("token_level_scores", "rm_scores"):  # a DataProto's reward stands at the last token
        if name in fields:
            return {"reward": float(get_nullable_floats(fields, name)[0].sum())}
    return {}
