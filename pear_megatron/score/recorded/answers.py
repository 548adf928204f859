"""From what a generator answered, and was asked, to rows with token ids and log-probs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import FUNCTIONS, SYSTEM, get_integers, get_mask, short
from pear_megatron.score.recorded.beside import CARRIED
from pear_megatron.score.recorded.request import CONTEXT_FIELDS, Request, refuse_images
from pear_megatron.score.recorded.tokens import RECORD_IDS, Tokens, id_in
from pear_megatron.score.recorded.top import ENTRIES, Entries

Recorded = tuple[dict[str, Any], dict[str, Any]]  # (fields as the loader knows them, notes for the metadata)

UNFINISHED = "unfinished"  # a note: the generator had not finished the answer
_NO_LOGPROB = -9999.0  # what vLLM writes where it has none
_ENDED = ("stop", "eos", "tool_calls", "function_call", "stop_sequence", "eos_token", "end_turn", "completed")
_CUT = ("length", "abort", "content_filter", "max_tokens", "max_output_tokens", "model_length", "repetition")


@dataclass(frozen=True)
class Answer:
    """One response, with what was recorded of it.

    Attributes:
        place: where the log-probs stand, for messages.
        logprobs: one per generated token, None = null.
        tokens: one text, or ``token_id:N``, per log-prob; None where only ids were recorded.
        ids: the generated tokens; None where only texts were recorded.
        message: of a chat, the assistant's; None for a plain text.
        text: of a plain text.
        finish_reason: as the generator gave it; None where it gave none, or had not finished.
        stop: the stop string or token that ended it, if the generator says so.
        context_ids: the prompt's tokens, if the answer has them.
        counts: (name, value) of the generator's own counts of prompt and of generated tokens, in this order.
        reasoning_count: generated tokens that it says are reasoning.
        reward: of this answer alone.
        entries: the likeliest tokens recorded with each log-prob; None = the form has none.
    """

    place: str
    logprobs: list[float | None]
    tokens: list[str] | None = None
    ids: list[int] | None = None
    message: Mapping[str, Any] | None = None
    text: str | None = None
    finish_reason: Any = None
    stop: Any = None
    context_ids: list[int] | None = None
    counts: Sequence[tuple[str, Any]] = ()
    reasoning_count: int = 0
    reward: Any = None
    entries: Entries | None = None


@dataclass(frozen=True)
class Whole:
    """The log-probs of a whole trajectory that the row gives: one entry a token.

    Attributes:
        ids: the token whose log-prob it is, None where only a text was recorded.
        tokens: texts, where they were recorded.
        entries: as of an Answer.
    """

    place: str
    logprobs: list[float | None]
    ids: list[int | None] | None = None
    tokens: list[str] | None = None
    entries: Entries | None = None


def gives_whole(fields: Mapping[str, Any], request: Request) -> bool:
    """Whether the row gives a whole trajectory, so that the log-probs are those of a prompt."""
    text = fields.get("prompt") is not None and isinstance(fields.get("response"), str)
    return "input_ids" in fields or "loss_mask" in fields or request.ends_with_assistant or text


def whole_row(
    fields: Mapping[str, Any], ids: list[int], mask: list[bool], whole: Whole, tokens: Tokens
) -> Recorded:
    """The row of a trajectory (``ids``, ``mask``) that the row itself gives; RowProblem if log-probs are of others."""
    if len(whole.logprobs) != len(ids):
        raise RowProblem(
            f"{whole.place} has {len(whole.logprobs)} tokens and the trajectory {len(ids)}: the row gives the whole "
            "trajectory, so the log-probs of all of it are needed; send these token ids as the prompt, or give only "
            "the request's messages or prompt where the response was generated"
        )
    if whole.ids is not None:
        tokens.check_ids(ids, whole.ids, whole.place)
    if whole.tokens is not None:
        tokens.check(ids, whole.tokens, whole.place)
    found = {"input_ids": ids, "loss_mask": mask, "behavior_logprobs": whole.logprobs, ENTRIES: whole.entries}
    found |= {name: fields[name] for name in CARRIED if name in fields}
    return found | own_fields(fields), notes_of(fields)


def trajectory(fields: Mapping[str, Any], request: Request, tokens: Tokens) -> tuple[list[int], list[bool]]:
    """(input_ids, loss_mask) of a whole trajectory in the row."""
    if "input_ids" in fields or "loss_mask" in fields:
        for name, other in (("input_ids", "loss_mask"), ("loss_mask", "input_ids")):
            if name not in fields:
                raise RowProblem(f"missing field {name!r}: {other!r} does not come without it; add it")
        return get_integers(fields, "input_ids").tolist(), get_mask(fields, "loss_mask").tolist()
    return tokens.of_trajectory(request, fields.get("response"))


def rows_of(
    fields: Mapping[str, Any],
    request: Request,
    answers: Sequence[Answer],
    tokens: Tokens,
    *,
    identity: Any = None,
    generator: Any = None,
) -> list[Recorded]:
    """A row for each answer: its context, then its tokens, which are the decisions."""
    rewards = _rewards(fields, answers)
    found = []
    for k, answer in enumerate(answers):
        try:
            row, notes = _row(request, answer, tokens, fields.get("truncated"))
        except RowProblem as problem:
            if len(answers) == 1:
                raise
            raise RowProblem(f"answer {k} of {len(answers)}: {problem}") from problem
        own = own_fields(fields)
        own.pop("reward", None)
        name = own.pop("id", identity)
        if name is not None:
            own["id"] = f"{name}#{k}" if len(answers) > 1 else name
        if rewards[k] is not None:
            own["reward"] = rewards[k]
        notes = notes_of(fields) | notes | ({} if generator is None else {"generator": generator})
        if row.get("truncated"):
            own.pop("truncated", None)  # the generator's word is enough
        found.append((row | own, notes))
    return found


def _rewards(fields: Mapping[str, Any], answers: Sequence[Answer]) -> list[Any]:
    own = [answer.reward for answer in answers]
    given = fields.get("reward", fields.get("rewards"))
    if isinstance(given, list):
        if len(given) != len(answers):
            raise RowProblem(
                f"reward has {len(given)} entries and the row {len(answers)} answers; write one an answer"
            )
        return given
    if all(reward is not None for reward in own):
        return own
    if any(reward is not None for reward in own):
        raise RowProblem("some answers have a reward of their own and some have none; write one for each")
    if given is not None and len(answers) > 1:
        raise RowProblem(
            f"reward = {short(given)}, but the row has {len(answers)} answers; write a list with one an answer, or "
            "leave it out"
        )
    return [given] * len(answers)


def _row(request: Request, answer: Answer, tokens: Tokens, marked: Any) -> Recorded:
    """A row of an answer; ``marked`` is what the user says of its being truncated."""
    if not answer.logprobs:
        raise RowProblem(
            f"{answer.place} is empty: an empty response has no decision to learn from; drop the row"
        )
    # Servers write null as long as they have not finished, as in every part of a stream but the last.
    unfinished = answer.finish_reason is None and marked is not False and not _ends(answer, tokens)
    truncated = unfinished or is_cut(answer.finish_reason)
    stopped = (isinstance(answer.stop, str) or marked is True) and not _ends(answer, tokens)
    context, response = _tokens_of(request, answer, tokens, truncated or stopped)
    if len(response) != len(answer.logprobs):
        instead = (
            ' (where the server leaves the end of turn out of its log-probs, write "truncated": true)'
            if len(response) == len(answer.logprobs) + 1
            else ""
        )
        raise RowProblem(
            f"{answer.place} has {len(answer.logprobs)} tokens and the response {len(response)} (its end of turn "
            f"is one of them){_of_what(answer)}; {RECORD_IDS}, or score with --model{instead}"
        )
    if None in answer.logprobs:
        raise RowProblem(
            f"{answer.place}[{answer.logprobs.index(None)}] is null on a decision; drop the row, or score with --model"
        )
    if answer.tokens is not None:
        tokens.check(response, answer.tokens, answer.place)
    _check_counts(answer, len(context), len(response))
    row = {
        "input_ids": context + response,
        "loss_mask": [False] * len(context) + [True] * len(response),
        "behavior_logprobs": [*[None] * len(context), *answer.logprobs],
        ENTRIES: answer.entries,
    }
    message = answer.message or {}
    said = {"response": answer.text if answer.message is None else message.get("content")}
    said |= {name: message.get(name) for name in ("reasoning_content", "tool_calls")}
    said |= {"finish_reason": answer.finish_reason, "stop_reason": answer.stop}
    said |= {UNFINISHED: unfinished or None}
    notes = {name: value for name, value in said.items() if value not in (None, [])}
    return row | ({"truncated": True} if truncated else {}), notes


def _tokens_of(
    request: Request, answer: Answer, tokens: Tokens, endless: bool
) -> tuple[list[int], list[int]]:
    """(ids of the context, ids of the response)."""
    response = answer.ids
    if response is None and answer.tokens is not None:
        in_text = [id_in(token) for token in answer.tokens]
        if None not in in_text:
            response = [token_id for token_id in in_text if token_id is not None]
    refuse_images(request.messages)
    context = answer.context_ids if answer.context_ids is not None else request.ids
    if context is None:
        context = tokens.of_context(request, chat=answer.message is not None)
    recorded = answer.tokens or []
    if response is None and answer.message is None:
        text = _with_stop(answer.text, answer)
        response = tokens.of_text(text, recorded, truncated=endless)
    elif response is None:
        message = dict(answer.message or {})
        message["content"] = _with_stop(message.get("content"), answer)
        response = tokens.of_message(request, message, recorded, truncated=endless)
    else:
        tokens.check_said(context, response, _said(answer))
    return list(context), list(response)


def _with_stop(text: Any, answer: Answer) -> Any:
    """A text with the stop string that ended it, which vLLM takes off the text but not off the tokens."""
    if not isinstance(answer.stop, str) or not isinstance(text, str):
        return text
    whole = "".join(answer.tokens or [])
    return whole if whole.startswith(text) and whole[len(text) :].startswith(answer.stop) else text


def _said(answer: Answer) -> dict[str, Any]:
    """All that the policy said, as the generator parsed it."""
    if answer.message is None:
        return {"text": answer.text}
    calls = [call.get("function") or {} for call in answer.message.get("tool_calls") or []]
    names = {f"tool call {k}": function.get("name") for k, function in enumerate(calls)}
    return {"reasoning": _reasoning(answer.message), "text": answer.message.get("content"), **names}


def _ends(answer: Answer, tokens: Tokens) -> bool:
    """Whether its last token is known to be one that ends a text."""
    recorded: Sequence[int | str] = answer.ids or answer.tokens or []
    return bool(recorded) and tokens.is_end(recorded[-1]) is True


def _of_what(answer: Answer) -> str:
    """What the log-probs may not cover."""
    message = answer.message or {}
    if answer.reasoning_count or _reasoning(message):
        return ": the log-probs do not cover its reasoning, which was generated as well"
    if message.get("tool_calls"):
        return ": the log-probs do not cover its tool calls, or the chat template writes them another way"
    return ""


def _reasoning(message: Mapping[str, Any]) -> Any:
    return message.get("reasoning_content") or message.get("reasoning")


def _check_counts(answer: Answer, context: int, response: int) -> None:
    ours_and_what = ((context, ""), (response, _of_what(answer)))
    for (name, count), (ours, what) in zip(answer.counts, ours_and_what, strict=False):
        if count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, int) or count != ours:
            raise RowProblem(
                f"{name} = {short(count)}, but this row has {ours}{what}: another tokenizer or chat template (or "
                f"template arguments, or tools) made the server's tokens, or the row is damaged; {RECORD_IDS}"
            )


def is_cut(finish_reason: Any) -> bool:
    """Whether something else than the policy ended the response; RowProblem for an error or an unknown word."""
    kind = finish_reason.get("type") if isinstance(finish_reason, Mapping) else finish_reason
    if finish_reason is None:
        return False
    if kind in _CUT:
        return True
    if kind not in _ENDED:
        raise RowProblem(
            f"finish_reason = {short(finish_reason)} says neither that the policy ended the response (stop, "
            "tool_calls) nor that it was cut (length, abort); drop the row"
        )
    return False


def own_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the user put beside the answer and the loader knows."""
    own = {name: fields[name] for name in ("reward", "truncated") if name in fields}
    identity = fields.get("custom_id", fields.get("id"))
    return own | ({} if identity is None else {"id": identity})


def notes_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What else of the row is worth keeping."""
    names = ("messages", "prompt", *SYSTEM, *CONTEXT_FIELDS, FUNCTIONS)
    return {name: fields[name] for name in names if name in fields}


def number(value: Any, place: str) -> float | None:
    """A log-prob, None for null; RowProblem for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowProblem(f"{place}: log-prob {short(value)} is no number")
    if value <= _NO_LOGPROB:
        raise RowProblem(
            f"{place}: log-prob {value:g} is the server's word for none; drop the row, or score with --model"
        )
    return float(value)
