"""Responses of vLLM and other OpenAI-compatible servers, chat and completions, as they answered.

The log-probs of a generated response stand in ``choices[0].logprobs``; those of a whole given trajectory in
``prompt_logprobs`` (vLLM), or in ``choices[0].logprobs`` of a completion with ``echo``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import get_integers, get_mask, short
from pear_megatron.score.recorded.tokens import RECORD_IDS, Tokens, id_in

_NO_LOGPROB = -9999.0  # what vLLM writes where it has none
_TEXTS = ("messages", "prompt")


@dataclass(frozen=True)
class _Recorded:
    """A choice's tokens, as text or ``token_id:N``, and their log-probs (None = null)."""

    tokens: list[str]
    logprobs: list[float | None]
    name: str


def is_response(fields: Mapping[str, Any]) -> bool:
    """Whether the row holds a server's answer."""
    return "choices" in fields or "prompt_logprobs" in fields or isinstance(fields.get("response"), dict)


def from_response(fields: Mapping[str, Any], tokens: Tokens) -> tuple[dict[str, Any], dict[str, Any]]:
    """See ``ordinary_fields``.

    The row is the response, beside the request's ``messages`` or ``prompt``; or has it in ``response``, as it
    is or as a batch job writes it (``{"custom_id", "response": {"body": ...}}``). Where the row gives the whole
    trajectory (input_ids+loss_mask, messages that end with the assistant, prompt+response), the log-probs are
    the prompt's.
    """
    body = _body(fields)
    choice = _choice(body)
    messages, prompt = fields.get("messages"), fields.get("prompt")
    text = fields.get("response") if isinstance(fields.get("response"), str) else None
    ends_with_assistant = messages is not None and messages[-1].get("role") == "assistant"
    if "input_ids" in fields or ends_with_assistant or (prompt is not None and text is not None):
        if "input_ids" in fields:
            ids = get_integers(fields, "input_ids").tolist()
            if "loss_mask" not in fields:
                raise RowProblem("missing field 'loss_mask': 'input_ids' does not come without it; add it")
            mask = get_mask(fields, "loss_mask").tolist()
        else:
            ids, mask = tokens.of_trajectory(messages, prompt, text)
        logprobs = _of_whole(ids, fields, body, choice, tokens)
    else:
        context, response, generated = _of_generated(fields, body, choice, tokens)
        ids, mask = context + response, [False] * len(context) + [True] * len(response)
        logprobs = [*[None] * len(context), *generated]
        text = _text(choice)
    found: dict[str, Any] = {"input_ids": ids, "loss_mask": mask, "behavior_logprobs": logprobs}
    identity = fields.get("custom_id", fields.get("id", body.get("id")))
    found |= {"id": identity} if identity is not None else {}
    found |= {name: fields[name] for name in ("reward", "truncated") if name in fields}
    if choice.get("finish_reason") == "length" and not mask_is_given(fields):
        found["truncated"] = True
    notes = {name: fields[name] for name in _TEXTS if name in fields} | {"response": text}
    notes |= {"generator": body.get("model"), "finish_reason": choice.get("finish_reason")}
    return found, {name: value for name, value in notes.items() if value is not None}


def mask_is_given(fields: Mapping[str, Any]) -> bool:
    """Whether the row says which tokens are decisions: then the server's stop says nothing about them."""
    return "input_ids" in fields


def _body(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    body = fields.get("response")
    if not isinstance(body, dict):
        return fields
    if fields.get("error") or body.get("status_code", 200) != 200:
        raise RowProblem(f"the request failed ({short(fields.get('error') or body)}); drop the row")
    return body.get("body", body)


def _choice(body: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = body.get("choices", [{}])
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else 0
        raise RowProblem(f"choices has {count} entries; write one row a choice, each with its own reward")
    return choices[0]


def _text(choice: Mapping[str, Any]) -> str | None:
    return (choice.get("message") or {}).get("content") if "message" in choice else choice.get("text")


def _of_whole(
    ids: Sequence[int],
    fields: Mapping[str, Any],
    body: Mapping[str, Any],
    choice: Mapping[str, Any],
    tokens: Tokens,
) -> list[float | None]:
    """Log-probs of given tokens, one per token, null for the first."""
    for place in (body, choice, fields):
        if place.get("prompt_logprobs") is not None:
            return _from_prompt_logprobs(ids, place["prompt_logprobs"])
    recorded = _recorded(choice)
    if len(recorded.tokens) < len(ids):
        raise RowProblem(
            f"{recorded.name} has {len(recorded.tokens)} tokens and the trajectory {len(ids)}: the row gives the whole "
            "trajectory, so the log-probs of all of it are needed; ask for prompt_logprobs=0 (vLLM), or give "
            "only the request's messages or prompt where the response was generated"
        )
    tokens.check(ids, recorded.tokens[: len(ids)], recorded.name)
    return recorded.logprobs[: len(ids)]


def _from_prompt_logprobs(ids: Sequence[int], entries: Any) -> list[float | None]:
    if not isinstance(entries, list) or len(entries) != len(ids):
        count = len(entries) if isinstance(entries, list) else short(entries)
        raise RowProblem(
            f"prompt_logprobs has {count} entries and the trajectory {len(ids)} tokens; send these token ids as "
            "the prompt"
        )
    logprobs: list[float | None] = []
    for i, (token_id, entry) in enumerate(zip(ids, entries, strict=True)):
        if entry is None:
            logprobs.append(None)
            continue
        if str(token_id) not in entry:
            raise RowProblem(
                f"prompt_logprobs[{i}] is of token {' or '.join(list(entry)[:3])}, but the trajectory has token "
                f"{token_id} there: it is shifted or belongs to other tokens; send these token ids as the prompt"
            )
        logprobs.append(_number(entry[str(token_id)]["logprob"], f"prompt_logprobs[{i}]"))
    return logprobs


def _of_generated(
    fields: Mapping[str, Any], body: Mapping[str, Any], choice: Mapping[str, Any], tokens: Tokens
) -> tuple[list[int], list[int], list[float | None]]:
    """(ids of the context, ids of the response, its log-probs)."""
    recorded = _recorded(choice)
    if not recorded.tokens:
        raise RowProblem(
            f"{recorded.name} is empty: an empty response has no decision to learn from; drop the row"
        )
    messages, prompt = fields.get("messages"), fields.get("prompt")
    ids_in_text = [id_in(token) for token in recorded.tokens]
    context = next(
        (place["prompt_token_ids"] for place in (body, choice, fields) if place.get("prompt_token_ids")), None
    )
    if choice.get("token_ids"):
        response = list(choice["token_ids"])
    elif None not in ids_in_text:
        response = [token_id for token_id in ids_in_text if token_id is not None]
    else:
        truncated = choice.get("finish_reason") == "length"
        encoded, response = tokens.of_response(messages, prompt, _text(choice) or "", truncated=truncated)
        context = context or encoded
    context = list(context) if context else tokens.of_prompt(messages, prompt)
    if len(response) != len(recorded.tokens):
        raise RowProblem(
            f"{recorded.name} has {len(recorded.tokens)} tokens and the response {len(response)} (its end of turn "
            f"is one of them); {RECORD_IDS}, or score with --model"
        )
    tokens.check(response, recorded.tokens, recorded.name)
    _check_usage(body, len(context), len(response))
    return context, response, recorded.logprobs


def _check_usage(body: Mapping[str, Any], context: int, response: int) -> None:
    usage = body.get("usage") or {}
    for name, ours in (("prompt_tokens", context), ("completion_tokens", response)):
        if usage.get(name, ours) != ours:
            raise RowProblem(
                f"usage.{name} = {usage[name]}, but this row has {ours}: another tokenizer or chat template (or "
                f"template arguments, or tools) made the server's tokens; {RECORD_IDS}"
            )


def _recorded(choice: Mapping[str, Any]) -> _Recorded:
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        raise RowProblem(
            "choices[0].logprobs is missing: ask the server for logprobs (chat: logprobs=true, completions: "
            "logprobs=1), or score with --model"
        )
    if logprobs.get("content") is not None:
        name, entries = "logprobs.content", logprobs["content"]
        texts = [entry["token"] for entry in entries]
        values = [entry.get("logprob") for entry in entries]
    else:
        name, texts = "logprobs.tokens", logprobs.get("tokens") or []
        values = logprobs.get("token_logprobs") or []
    if len(texts) != len(values):
        raise RowProblem(
            f"{name} has {len(texts)} tokens and {len(values)} log-probs; the row is damaged, drop it"
        )
    numbers = [None if v is None else _number(v, f"{name}[{i}]") for i, v in enumerate(values)]
    return _Recorded(texts, numbers, name)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowProblem(f"{name}: log-prob {short(value)} is no number")
    if value <= _NO_LOGPROB:
        raise RowProblem(
            f"{name}: log-prob {value:g} is the server's word for none; drop the row, or score with --model"
        )
    return float(value)
