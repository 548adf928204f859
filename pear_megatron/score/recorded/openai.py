"""Answers of vLLM, SGLang and other OpenAI-compatible servers: chat, completions and vLLM's /inference/v1/generate.

The log-probs of a generated response stand in each choice's ``logprobs``; those of a whole given trajectory in
``prompt_logprobs`` (vLLM), or in the ``logprobs`` of a completion with ``echo``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import get_integers, get_nullable_floats, short
from pear_megatron.score.recorded.answers import (
    Answer,
    Recorded,
    Whole,
    gives_whole,
    number,
    rows_of,
    trajectory,
    whole_row,
)
from pear_megatron.score.recorded.beside import check_inside
from pear_megatron.score.recorded.nemo_gym import IDS, LOGPROBS
from pear_megatron.score.recorded.request import Request
from pear_megatron.score.recorded.tokens import ID_PREFIX, Tokens
from pear_megatron.score.recorded.top import of_pairs
from pear_megatron.score.recorded.vllm import prompt_logprobs

FIELDS = (
    *("choices", "prompt_logprobs", "usage", "object", "created", "system_fingerprint", "service_tier"),
    *("kv_transfer_params", "input_ids", "loss_mask", "rewards", "logprobs", "top_logprobs"),
)


def is_answer(body: Mapping[str, Any]) -> bool:
    """Whether it is the answer of an OpenAI-compatible server."""
    return body.get("choices") is not None or body.get("prompt_logprobs") is not None


def read(fields: Mapping[str, Any], body: Mapping[str, Any], tokens: Tokens) -> list[Recorded]:
    """See ``ordinary_fields``; ``body`` is the answer in the row, or the row itself."""
    request = Request.of(fields)
    choices = [{}] if body.get("choices") is None else body["choices"]
    if not isinstance(choices, list) or not choices or not all(isinstance(c, Mapping) for c in choices):
        raise RowProblem(f"choices = {short(choices)}; it must be a list of choices, not empty")
    if gives_whole(fields, request):
        if len(choices) > 1:
            raise RowProblem(
                f"choices has {len(choices)} entries beside a whole trajectory; give the request's messages alone"
            )
        ids, mask = trajectory(fields, request, tokens)
        return [whole_row(fields, ids, mask, _whole(ids, fields, body, choices[0]), tokens)]
    for k, choice in enumerate(choices):
        check_inside(choice, f"choices[{k}]", ("reward",))
    answers = [
        _answer(request, body, choice, f"choices[{k}]", len(choices)) for k, choice in enumerate(choices)
    ]
    return rows_of(
        fields,
        request,
        answers,
        tokens,
        identity=body.get("id", body.get("request_id")),
        generator=body.get("model"),
    )


def _answer(
    request: Request, body: Mapping[str, Any], choice: Mapping[str, Any], name: str, count: int
) -> Answer:
    message = choice.get("message")
    if message is not None and not isinstance(message, Mapping):
        raise RowProblem(f"{name}.message = {short(message)}; it must be the assistant's message")
    place, texts, values = _logprobs(choice, name)
    usage = body.get("usage") or {}
    said = message or {}  # NeMo-Gym writes the tokens there
    places = (choice, body, said)
    context = next((p["prompt_token_ids"] for p in places if p.get("prompt_token_ids")), None)
    ids, text = _ids(choice, "token_ids") or _ids(said, "generation_token_ids"), choice.get("text")
    echoed = _echoed(values, usage.get("prompt_tokens") if context is None else len(context), place)
    if echoed and ids is None and isinstance(text, str) and request.prompt is not None:
        text = text.removeprefix(request.prompt)
    return Answer(
        place=place,
        logprobs=values[echoed:],
        tokens=texts if texts is None else texts[echoed:],
        ids=ids,
        message=message,
        text=text,
        finish_reason=choice.get("finish_reason"),
        stop=choice.get("stop_reason", choice.get("matched_stop")),  # vLLM's name and SGLang's
        context_ids=None if context is None else _ids({"prompt_token_ids": context}, "prompt_token_ids"),
        counts=(
            ("usage.prompt_tokens", usage.get("prompt_tokens")),
            # Several choices share one count.
            ("usage.completion_tokens", usage.get("completion_tokens") if count == 1 else None),
        ),
        reasoning_count=(usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0,
        reward=choice.get("reward"),
        entries=None if texts is None else lambda: _top(choice, name)[echoed:],
    )


def _echoed(values: list[float | None], prompt: Any, place: str) -> int:
    """How many of a choice's log-probs are the prompt's, which ``echo`` puts first, the first of all being null."""
    if not values or values[0] is not None:
        return 0
    if not isinstance(prompt, int):
        why = "nothing says how long it is: keep the answer's usage, or ask for return_token_ids=true"
    elif prompt >= len(values):
        why = (
            "nothing follows: where it is a given text, say where its response begins (messages that end with the "
            "assistant's, or input_ids and loss_mask)"
        )
    else:
        return prompt
    raise RowProblem(f"{place} begins with the prompt (echo), and {why}")


def _ids(place: Mapping[str, Any], name: str) -> list[int] | None:
    return None if place.get(name) is None else get_integers(place, name).tolist()


def _whole(
    ids: list[int], fields: Mapping[str, Any], body: Mapping[str, Any], choice: Mapping[str, Any]
) -> Whole:
    for place in (body, choice, fields):
        if place.get("prompt_logprobs") is not None:
            return prompt_logprobs(ids, place["prompt_logprobs"])
    name, texts, values = _logprobs(choice, "choices[0]")
    # With echo, what was generated after the trajectory follows.
    entries = lambda: _top(choice, "choices[0]")[: len(ids)]  # noqa: E731
    texts = None if texts is None else texts[: len(ids)]
    return Whole(name, values[: len(ids)], tokens=texts, entries=entries)


def _top(choice: Mapping[str, Any], name: str) -> list[dict[int, float] | None]:
    """The likeliest tokens of each token of a choice: {token_id:N: log-prob}, or a list of {token, logprob}."""
    logprobs = choice["logprobs"]
    if logprobs.get("content") is not None:
        tops = [entry.get("top_logprobs") for entry in logprobs["content"]]
        pairs = [top and [(_token(entry), entry["logprob"]) for entry in top] for top in tops]
    else:
        pairs = [top and list(top.items()) for top in logprobs.get("top_logprobs") or []]
    if not any(pairs):
        raise RowProblem(
            f"{name}.logprobs has no top_logprobs: ask for them (chat: top_logprobs=K, completions: logprobs=K) with "
            "return_tokens_as_token_ids=true, or leave --top-k out"
        )
    return [of_pairs(one or None, f"{name}.logprobs, token {i}: top_logprobs") for i, one in enumerate(pairs)]


def _logprobs(choice: Mapping[str, Any], name: str) -> tuple[str, list[str] | None, list[float | None]]:
    """(its name, the tokens as texts or ``token_id:N``, their log-probs) of a choice's logprobs."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        message = choice.get("message") or {}
        called = message.get("tool_calls")
        if message.get(LOGPROBS) and message.get(IDS[1]):
            place = f"{name}.message.{LOGPROBS}"
            values = get_nullable_floats(message, LOGPROBS)[0].tolist()
            return place, None, [number(value, f"{place}[{i}]") for i, value in enumerate(values)]
        raise RowProblem(
            f"{name}.logprobs is missing{', and the answer has tool calls' if called else ''}: ask the server for "
            "logprobs (chat: logprobs=true, completions: logprobs=1), or score with --model"
        )
    if logprobs.get("content") is not None:
        return read_content(logprobs["content"], f"{name}.logprobs.content")
    place, texts = f"{name}.logprobs.tokens", logprobs.get("tokens") or []
    values = logprobs.get("token_logprobs") or []
    if len(texts) != len(values):
        raise RowProblem(
            f"{place} has {len(texts)} tokens and {len(values)} log-probs; the row is damaged, drop it"
        )
    return place, _texts(texts, place), [number(value, f"{place}[{i}]") for i, value in enumerate(values)]


def read_content(entries: Any, place: str) -> tuple[str, list[str], list[float | None]]:
    """(place, the tokens' texts, their log-probs) of a list of {token, logprob}, as chat and Responses have it."""
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise RowProblem(
            f"{place} = {short(entries)}; it must be a list of {{token, logprob}}, as the server wrote it"
        )
    texts = _texts([_token(entry) for entry in entries], place)
    return place, texts, [number(entry.get("logprob"), f"{place}[{i}]") for i, entry in enumerate(entries)]


def _token(entry: Mapping[str, Any]) -> Any:
    """A token's text, or ``token_id:N`` where there is only its id, as in vLLM's answers in tokens."""
    token, token_id = entry.get("token"), entry.get("token_id")
    return token if token is not None or token_id is None else f"{ID_PREFIX}{token_id}"


def _texts(texts: Any, place: str) -> list[str]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise RowProblem(f"{place}[{i}] has the token {short(text)}; it must be the token's text")
    return list(texts)
