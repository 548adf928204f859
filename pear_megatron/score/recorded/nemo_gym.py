"""NeMo-Gym's rollouts, on which NeMo-RL trains: token ids and log-probs stand at the items that a model wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import get_integers, get_nullable_floats
from pear_megatron.score.recorded.answers import Recorded, is_cut, notes_of, number, own_fields
from pear_megatron.score.recorded.request import refuse_images
from pear_megatron.score.recorded.tokens import Tokens

IDS = ("prompt_token_ids", "generation_token_ids")
LOGPROBS = "generation_log_probs"
FIELDS = (
    *("responses_create_params", "output", "input", "instructions", "object", "created_at", "status"),
    *("usage", "incomplete_details", "parallel_tool_calls", "tool_choice", "agent_ref", "choices"),
)


def is_answer(body: Any) -> bool:
    """Whether its items (of a Responses output, or a chat's messages) have token ids and log-probs."""
    return isinstance(body, Mapping) and bool(_turns(body))


def read(fields: Mapping[str, Any], body: Mapping[str, Any], tokens: Tokens) -> list[Recorded]:
    """See ``ordinary_fields``: one trajectory, or several where a prompt does not continue what was before it."""
    refuse_images((fields.get("responses_create_params") or fields).get("input"), "input")
    refuse_images(fields.get("messages"))
    rows: list[dict[str, Any]] = []
    for place, item in _turns(body):
        for name in (*IDS, LOGPROBS):
            if not item.get(name):
                raise RowProblem(
                    f"{place}.{name} is missing or empty: write the rollout as NeMo-Gym has it, with {IDS[0]}, "
                    f"{IDS[1]} and {LOGPROBS}, or score with --model"
                )
        prompt, ids = (get_integers(item, name).tolist() for name in IDS)
        values = get_nullable_floats(item, LOGPROBS)[0].tolist()
        if len(values) != len(ids):
            raise RowProblem(
                f"{place}: {LOGPROBS} has {len(values)} entries and {IDS[1]} {len(ids)}; one per token"
            )
        tokens.check_said(prompt, ids, {"text": _text(item)})
        if not rows or rows[-1]["input_ids"] != prompt[: len(rows[-1]["input_ids"])]:
            rows.append({"input_ids": [], "loss_mask": [], "behavior_logprobs": []})
        row = rows[-1]
        between = len(prompt) - len(row["input_ids"])
        row["input_ids"] = prompt + ids
        row["loss_mask"] += [False] * between + [True] * len(ids)
        row["behavior_logprobs"] += [0.0] * between + [number(v, f"{place}.{LOGPROBS}") for v in values]
    if is_cut((body.get("incomplete_details") or {}).get("reason")) or body.get("status") == "incomplete":
        rows[-1]["truncated"] = True
    own, notes = own_fields(fields), notes_of(fields)
    if isinstance(notes.get("messages"), list):
        notes["messages"] = [_without_tokens(message) for message in notes["messages"]]
    names = [{"id": f"{own['id']}#{k}"} if "id" in own and len(rows) > 1 else {} for k in range(len(rows))]
    return [(own | row | name, notes) for row, name in zip(rows, names, strict=True)]


def _turns(body: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(place, item) of all that a model wrote."""
    names = ("output",) if body.get("choices") else ("output", "messages")
    items = [
        (f"{name}[{k}]", item)
        for name in names
        if isinstance(body.get(name), list)
        for k, item in enumerate(body[name])
    ]
    return [
        (place, item)
        for place, item in items
        if isinstance(item, Mapping) and any(item.get(name) for name in (IDS[1], LOGPROBS))
    ]


def _without_tokens(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    return {name: value for name, value in message.items() if name not in (*IDS, LOGPROBS)}


def _text(item: Mapping[str, Any]) -> str | None:
    content = item.get("content")
    if not isinstance(content, list):
        return content
    return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
