"""vLLM's offline ``RequestOutput`` as JSON, and its log-probs of given tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from pear_megatron.score.recorded.beside import check_inside
from pear_megatron.score.recorded.request import Request
from pear_megatron.score.recorded.tokens import Tokens
from pear_megatron.score.recorded.top import of_pairs

FIELDS = (
    *("outputs", "request_id", "prompt_logprobs", "finished", "metrics", "lora_request", "encoder_prompt"),
    *("encoder_prompt_token_ids", "num_cached_tokens", "multi_modal_placeholders", "kv_transfer_params"),
    *("input_ids", "loss_mask", "rewards"),
)


def is_answer(body: Mapping[str, Any]) -> bool:
    """Whether it is a ``RequestOutput``."""
    return body.get("outputs") is not None


def read(fields: Mapping[str, Any], body: Mapping[str, Any], tokens: Tokens) -> list[Recorded]:
    """See ``ordinary_fields``; ``body`` is the RequestOutput in the row, or the row itself."""
    request = Request.of(fields)
    if gives_whole(fields, request):
        ids, mask = trajectory(fields, request, tokens)
        return [whole_row(fields, ids, mask, prompt_logprobs(ids, body.get("prompt_logprobs")), tokens)]
    outputs = body["outputs"]
    if not isinstance(outputs, list) or not outputs or not all(isinstance(o, Mapping) for o in outputs):
        raise RowProblem(f"outputs = {short(outputs)}; it must be the list of completions, not empty")
    for name, place in (("prompt_token_ids", body), *(("token_ids", output) for output in outputs)):
        if place.get(name) is None:
            raise RowProblem(
                f"missing field {name!r}: write it with the outputs, as vLLM's RequestOutput has it"
            )
    for k, output in enumerate(outputs):
        check_inside(output, f"outputs[{k}]", ("reward",))
    context = get_integers(body, "prompt_token_ids").tolist()
    answers = [_answer(output, context, f"outputs[{k}]") for k, output in enumerate(outputs)]
    return rows_of(fields, request, answers, tokens, identity=body.get("request_id"))


def _answer(output: Mapping[str, Any], context: list[int], name: str) -> Answer:
    ids, place = get_integers(output, "token_ids").tolist(), f"{name}.logprobs"
    return Answer(
        place=place,
        logprobs=of_ids(ids, output.get("logprobs"), place, f"{name}.token_ids"),
        entries=lambda: entries_of(output.get("logprobs"), place),
        ids=ids,
        text=output.get("text"),
        finish_reason=output.get("finish_reason"),
        stop=output.get("stop_reason"),
        context_ids=context,
        reward=output.get("reward"),
    )


def prompt_logprobs(ids: Sequence[int], entries: Any) -> Whole:
    """The log-probs of a prompt's tokens, null for the first.

    The prompt may be longer than the trajectory, as chat templates write a line break after the last turn: what comes
    later changes no log-prob.
    """
    place = "prompt_logprobs"
    listed = _from_flat(entries, place) if isinstance(entries, Mapping) else entries
    if isinstance(listed, list) and all(isinstance(entry, Mapping) for entry in listed[len(ids) :]):
        listed = listed[: len(ids)]  # each with its id, which of_ids compares
    return Whole(
        place, of_ids(ids, listed, place, "the trajectory"), entries=lambda: entries_of(listed, place)
    )


def entries_of(recorded: Any, place: str) -> list[dict[int, float] | None]:
    """What vLLM recorded of each token, in the forms of ``of_ids``: {id: log-prob}, of one number nothing."""
    positions = _from_flat(recorded, place) if isinstance(recorded, Mapping) else recorded
    return [
        of_pairs([(int(i), entry["logprob"]) for i, entry in one.items()], f"{place}[{j}]")
        if isinstance(one, Mapping)
        else None
        for j, one in enumerate(positions)
    ]


def of_ids(ids: Sequence[int], entries: Any, place: str, what: str) -> list[float | None]:
    """The log-probs of these tokens among vLLM's: one {id: {logprob}} or one number a token, or FlatLogprobs."""
    if isinstance(entries, Mapping):
        entries = _from_flat(entries, place)
    if not isinstance(entries, list):
        raise RowProblem(
            f"{place} is {short(entries)}; ask for logprobs=0 or prompt_logprobs=0, or score with --model"
        )
    if len(entries) != len(ids):
        raise RowProblem(
            f"{place} has {len(entries)} entries and {what} {len(ids)} tokens; the log-probs are of other tokens "
            "(of a text that was sent without the chat template, for one), or the row is damaged"
        )
    values = []
    for i, (token_id, entry) in enumerate(zip(ids, entries, strict=True)):
        if isinstance(entry, Mapping):
            if str(token_id) not in entry:
                raise RowProblem(
                    f"{place}[{i}] is of token {' or '.join(list(entry)[:3])}, but {what} has token {token_id} there: "
                    "it is shifted or belongs to other tokens; send these token ids as the prompt, or drop the row"
                )
            entry = entry[str(token_id)]
            if not isinstance(entry, Mapping) or "logprob" not in entry:
                raise RowProblem(f"{place}[{i}] = {short(entry)} has no logprob; write it as vLLM has it")
            entry = entry["logprob"]
        values.append(number(entry, f"{place}[{i}]"))
    return values


def _from_flat(flat: Mapping[str, Any], place: str) -> list[Any]:
    """FlatLogprobs as a list of {id: {logprob}}: entry i has the candidates from start_indices[i] to end_indices[i]."""
    names = ("start_indices", "end_indices", "token_ids")
    if not all(isinstance(flat.get(name), list) for name in (*names, "logprobs")):
        raise RowProblem(f"{place} = {short(flat)}; FlatLogprobs have lists {', '.join(names)} and logprobs")
    starts, ends, ids = (get_integers(flat, name).tolist() for name in names)
    values = flat["logprobs"]
    if len(starts) != len(ends) or len(ids) != len(values) or max(ends, default=0) > len(ids):
        raise RowProblem(f"{place} has lists of different lengths; the row is damaged, drop it")
    return [
        {str(ids[j]): {"logprob": values[j]} for j in range(start, end)} or None
        for start, end in zip(starts, ends, strict=True)
    ]
