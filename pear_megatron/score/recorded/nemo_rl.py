"""NeMo-RL rollouts: its message logs, and the train_data_stepN.jsonl that its GRPO writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import get_integers, get_mask, get_nullable_floats, short
from pear_megatron.score.recorded.answers import Recorded

# What NeMo-RL writes; rows may have more.
FIELDS = (
    *("message_log", "token_ids", "token_loss_mask", "generation_logprobs", "input_lengths"),
    *(
        "sample_loss_mask",
        "rewards",
        "total_reward",
        "content",
        "agent_ref",
        "advantages",
        "prev_logprobs",
        "idx",
        "length",
    ),
    *("loss_multiplier", "extra_env_info", "task_name", "stop_strings"),
)


def from_message_log(fields: Mapping[str, Any]) -> Recorded:
    """``message_log``: messages with role, token_ids and, where generated, generation_logprobs.

    As in NeMo-RL, decisions are the tokens of assistant messages that have generation_logprobs; a
    token_loss_mask, which it adds before training, goes before that.
    """
    log = fields["message_log"]
    if not isinstance(log, list) or not log or not all(isinstance(message, dict) for message in log):
        raise RowProblem(f"message_log = {short(log)}; it must be a list of messages, not empty")
    ids, mask, logprobs = [], [], []
    for k, message in enumerate(log):
        if "token_ids" not in message:
            raise RowProblem(f"message_log[{k}] has no token_ids; save the message log with them, as lists")
        message_ids = get_integers(message, "token_ids")
        count = len(message_ids)
        recorded = message.get("generation_logprobs")
        if message.get("token_loss_mask") is not None:
            decisions = get_mask(message, "token_loss_mask")
        else:
            decisions = np.full(count, message.get("role") == "assistant" and recorded is not None)
        values = (
            np.zeros(count) if recorded is None else get_nullable_floats(message, "generation_logprobs")[0]
        )
        for name, entries in (("token_loss_mask", len(decisions)), ("generation_logprobs", len(values))):
            if entries != count:
                raise RowProblem(
                    f"message_log[{k}]: {name} has {entries} entries and token_ids {count}; write one per token"
                )
        if recorded is None and decisions.any():
            raise RowProblem(
                f"message_log[{k}] is trained on but has no generation_logprobs; score with --model"
            )
        ids.append(message_ids)
        mask.append(decisions)
        logprobs.append(values)
    texts = [{"role": m.get("role"), "content": m.get("content")} for m in log if m.get("content")]
    found = _row(np.concatenate(ids), np.concatenate(mask), np.concatenate(logprobs), fields)
    return found, {"messages": texts} if texts else {}


def from_train_data(fields: Mapping[str, Any]) -> Recorded:
    """A line of train_data_stepN.jsonl: token_ids, token_loss_mask and generation_logprobs, padded on the right.

    NeMo-RL writes a batch of one: every value is a list of one entry.
    """
    row = {name: _only(value) for name, value in fields.items()}
    for name in ("token_ids", "token_loss_mask", "input_lengths"):
        if name not in row:
            raise RowProblem(f"missing field {name!r}: generation_logprobs do not come without it; add it")
    length = row["input_lengths"]
    ids, mask = get_integers(row, "token_ids"), get_mask(row, "token_loss_mask")
    values = get_nullable_floats(row, "generation_logprobs")[0]
    if isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= len(ids):
        raise RowProblem(f"input_lengths = {length!r}; token_ids has {len(ids)} entries, padding included")
    for name, entries in (("token_loss_mask", len(mask)), ("generation_logprobs", len(values))):
        if entries != len(ids):
            raise RowProblem(f"{name} has {entries} entries and token_ids {len(ids)}; write one per token")
    notes: dict[str, Any] = {name: row[name] for name in ("content", "agent_ref") if name in row}
    found = _row(ids[:length], mask[:length], values[:length], row)
    if row.get("sample_loss_mask", 1) == 0:  # left out of NeMo-RL's loss; this mark keeps it out of ours
        found["truncated"] = True
    return found, notes


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _row(
    ids: np.ndarray, mask: np.ndarray, logprobs: np.ndarray, fields: Mapping[str, Any]
) -> dict[str, Any]:
    reward = next((fields[name] for name in ("reward", "rewards", "total_reward") if name in fields), None)
    kept = {name: fields[name] for name in ("id", "truncated") if name in fields}
    kept |= {} if reward is None else {"reward": reward}
    return {"input_ids": ids, "loss_mask": mask, "behavior_logprobs": logprobs} | kept
