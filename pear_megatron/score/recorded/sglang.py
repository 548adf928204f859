"""Answers of SGLang's own ``/generate``: ``meta_info`` with (log-prob, id, text) a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import get_integers, short
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
from pear_megatron.score.recorded.request import Request
from pear_megatron.score.recorded.tokens import Tokens
from pear_megatron.score.recorded.top import of_pairs

FIELDS = ("text", "output_ids", "meta_info", "index", "input_ids", "loss_mask", "rewards")


def is_answer(body: Any) -> bool:
    """Whether it is an answer of /generate, or the list of several (n > 1)."""
    if isinstance(body, list):
        return bool(body) and all(is_answer(one) for one in body)
    return isinstance(body, Mapping) and isinstance(body.get("meta_info"), Mapping)


def read(fields: Mapping[str, Any], body: Any, tokens: Tokens) -> list[Recorded]:
    """See ``ordinary_fields``; ``body`` is the answer or the answers in the row, or the row itself."""
    if "input_ids" in fields and "loss_mask" not in fields:  # the request's name for the prompt
        fields = {
            "prompt_token_ids" if name == "input_ids" else name: value for name, value in fields.items()
        }
    request = Request.of(fields)
    bodies = body if isinstance(body, list) else [body]
    if gives_whole(fields, request):
        ids, mask = trajectory(fields, request, tokens)
        return [whole_row(fields, ids, mask, _whole(bodies[0]), tokens)]
    names = [f"response[{k}]." for k in range(len(bodies))] if len(bodies) > 1 else [""]
    answers = [_answer(one, name) for one, name in zip(bodies, names, strict=True)]
    return rows_of(fields, request, answers, tokens, identity=bodies[0]["meta_info"].get("id"))


def _answer(body: Mapping[str, Any], name: str) -> Answer:
    meta = body["meta_info"]
    place = f"{name}meta_info.output_token_logprobs"
    logprobs, ids = _entries(meta.get("output_token_logprobs"), place)
    for where, mapping in ((f"{name}output_ids", body), (f"{name}meta_info.output_ids", meta)):
        if mapping.get("output_ids") is not None and get_integers(mapping, "output_ids").tolist() != ids:
            raise RowProblem(f"{where} are other tokens than those of {place}; the row is damaged, drop it")
    prompt_count = meta.get("prompt_tokens")
    if prompt_count is None:
        raise RowProblem(f"{name}meta_info.prompt_tokens is missing; write the answer as it came")
    finish_reason = meta.get("finish_reason")
    context = None
    if meta.get("input_token_logprobs"):
        _, context = _entries(meta["input_token_logprobs"], f"{name}meta_info.input_token_logprobs")
        if len(context) != prompt_count:  # only those from logprob_start_len on: the request has the prompt
            context = None
    return Answer(
        place=place,
        logprobs=logprobs,
        ids=ids,
        text=body.get("text"),
        finish_reason=finish_reason,
        stop=finish_reason.get("matched") if isinstance(finish_reason, Mapping) else None,
        context_ids=context,
        counts=(
            (f"{name}meta_info.prompt_tokens", prompt_count),
            (f"{name}meta_info.completion_tokens", meta.get("completion_tokens")),
        ),
        reward=body.get("reward"),
        entries=lambda: _top(meta, "output_top_logprobs", len(ids), name),
    )


def _whole(body: Mapping[str, Any]) -> Whole:
    place = "meta_info.input_token_logprobs"
    entries = body["meta_info"].get("input_token_logprobs")
    if not entries:
        raise RowProblem(
            f"{place} is missing: the row gives a whole trajectory; send it as input_ids, with return_logprob and "
            "logprob_start_len=0"
        )
    logprobs, ids = _entries(entries, place)
    meta = body["meta_info"]
    top = "input_top_logprobs"
    return Whole(place, logprobs, ids=list(ids), entries=lambda: _top(meta, top, len(ids), ""))


def _top(meta: Mapping[str, Any], field: str, count: int, name: str) -> list[dict[int, float] | None]:
    """The likeliest tokens of each of ``count`` tokens: a list of [log-prob, id, text], null where there are none."""
    place, lists = f"{name}meta_info.{field}", meta.get(field)
    if not isinstance(lists, list) or len(lists) != count:
        said = (
            f"has {len(lists)} entries for {count} tokens"
            if isinstance(lists, list)
            else f"is {short(lists)}"
        )
        raise RowProblem(
            f"{place} {said}; ask for return_logprob=true and top_logprobs_num=K, or leave --top-k out"
        )
    return [
        of_pairs([(entry[1], entry[0]) for entry in one] if one else None, f"{place}[{i}]")
        for i, one in enumerate(lists)
    ]


def _entries(entries: Any, place: str) -> tuple[list[float | None], list[int]]:
    if not isinstance(entries, list):
        raise RowProblem(f"{place} is {short(entries)}; ask for return_logprob=true, or score with --model")
    for i, entry in enumerate(entries):
        if not isinstance(entry, list) or len(entry) not in (2, 3):
            raise RowProblem(
                f"{place}[{i}] = {short(entry)}; it must be [log-prob, id, text], as SGLang has it"
            )
    ids = get_integers({place: [entry[1] for entry in entries]}, place).tolist()
    return [number(entry[0], f"{place}[{i}]") for i, entry in enumerate(entries)], ids
