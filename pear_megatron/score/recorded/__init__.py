"""Log-probs that the generator recorded: answers of engines and samples of RL frameworks as ordinary rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import parsed, short
from pear_megatron.score.recorded import (
    nemo_gym,
    nemo_rl,
    openai,
    responses,
    sglang,
    slime,
    stream,
    verl,
    vllm,
)
from pear_megatron.score.recorded.answers import UNFINISHED, Recorded
from pear_megatron.score.recorded.beside import CARRIED, Remarks, check_inside, unread_fields
from pear_megatron.score.recorded.sampling import check_sampling
from pear_megatron.score.recorded.tokens import Tokens
from pear_megatron.score.recorded.top import ENTRIES, topk_fields

_ENGINES = (sglang, vllm, nemo_gym, responses, openai)
NO_END = (
    "responses that do not end with an end token, so that nothing in them teaches the model to stop (a stop string "
    'or the length limit ended them, or their end was not recorded; "truncated": true in a row has training drop it)'
)
_NOT_FINISHED = (
    "responses marked truncated because they have no finish_reason, as servers write before they have finished, and no "
    'end token that is known (where they are whole, write "truncated": false or name the --tokenizer)'
)
# Of a row in this package's form; not needed further.
_CHECKED = ("policy_logprobs", "temperature", "logprobs_mode")


def ordinary_fields(
    fields: Mapping[str, Any], tokens: Tokens, *, remarks: Remarks, raw_logprobs: bool = False, top_k: int = 0
) -> list[Recorded]:
    """(fields as the loader knows them, what else is worth keeping) of each trajectory in a row.

    The first has input_ids, loss_mask and behavior_logprobs, aligned; the second goes into the metadata. A row
    has several trajectories where the generator gave several answers; their ids then are ``id#0``, ``id#1``, ...

    Args:
        fields: the row as it stands in the file.
        tokens: the tokenizer, for rows without token ids.
        remarks: gets what the user should be told at the end.
        raw_logprobs: the user says that the engine logged the model's own log-probs, whatever it sampled with.
        top_k: take so many of the likeliest tokens that were recorded at each decision; 0 = none.

    Raises:
        RowProblem: no known form, log-probs that cannot be aligned with the tokens for certain, or that may be
            those of another distribution than the policy's at temperature 1.
    """
    hashed = {"tokenizer_hash": fields["tokenizer_hash"]} if "tokenizer_hash" in fields else {}
    try:
        rows = []
        for found, notes in _read(fields, tokens, raw_logprobs, remarks):
            entries = found.pop(ENTRIES, None)
            topk = topk_fields(found, entries, top_k) if top_k else {}
            if "behavior_logprobs" not in fields:
                _remark_end(found, notes, tokens, remarks)
            rows.append((hashed | found | topk, notes))
        return rows
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, RowProblem):
            raise
        raise RowProblem(
            f"the recorded log-probs are not in the form they should have ({type(error).__name__}: {error}); "
            "write the generator's answer as it came"
        ) from error


def _remark_end(found: Mapping[str, Any], notes: Mapping[str, Any], tokens: Tokens, remarks: Remarks) -> None:
    """Say of a response that the policy did not end itself what becomes of it."""
    if notes.get(UNFINISHED):
        remarks.counts[_NOT_FINISHED] += 1
    decisions: np.ndarray = np.flatnonzero(found["loss_mask"])
    if found.get("truncated") or not len(decisions):
        return
    ends = tokens.is_end(int(found["input_ids"][decisions[-1]]))
    if ends is False or (ends is None and isinstance(notes.get("stop_reason"), str)):
        remarks.counts[NO_END] += 1


def _read(fields: Mapping[str, Any], tokens: Tokens, raw: bool, remarks: Remarks) -> list[Recorded]:
    if "samples" in fields:
        return _read_samples(fields, raw, remarks)
    body = _body(fields)
    by_sglang = slime.is_sample(fields) or sglang.is_answer(body)
    if not _written_by_score(fields):
        check_sampling(fields, raw=raw, engine="sglang" if by_sglang else None)
    form = _form(fields, body)
    if form is not None:
        carried = CARRIED if form in _ENGINES and {"input_ids", "loss_mask"} <= set(fields) else ()
        remarks.unread.add(unread_fields(fields, form.FIELDS, carried=carried))
        if body is not fields:
            for answer in body if isinstance(body, list) else [body]:
                check_inside(answer, "response", ("reward",) if form is sglang else ())
    if "message_log" in fields:
        return [nemo_rl.from_message_log(fields)]
    if form is nemo_rl:
        return [nemo_rl.from_train_data(fields)]
    if form is slime:
        return [slime.from_sample(fields)]
    if form is verl:
        return [verl.from_rollout(fields)]
    if form is not None:
        read: list[Recorded] = form.read(fields, body, tokens)
        return read
    if "behavior_logprobs" in fields:
        own = {name: value for name, value in fields.items() if name not in _CHECKED}
        return [(own, {})]
    raise RowProblem(
        f"no recorded log-probs among the fields {', '.join(fields)}; known are answers with logprobs (vLLM, SGLang, "
        "OpenAI-compatible chat, completions and Responses), prompt_logprobs (vLLM), samples of slime, verl, "
        "NeMo-RL and NeMo-Gym, and behavior_logprobs. Without any, score with --model"
    )


def _form(fields: Mapping[str, Any], body: Any) -> Any:
    """The module that reads the row; None for a row in this package's form."""
    if "message_log" in fields or "generation_logprobs" in fields:
        return nemo_rl
    if slime.is_sample(fields):
        return slime
    if verl.is_rollout(fields):
        return verl
    return next((engine for engine in _ENGINES if engine.is_answer(body)), None)


def _body(fields: Mapping[str, Any]) -> Any:
    """The answer: in ``response``, as it is or as a batch job writes it, or the row itself."""
    body = fields.get("response")
    if isinstance(body, list) and stream.are_chunks(body):
        return stream.joined(body)
    if isinstance(body, list) and body and not sglang.is_answer(body):
        raise RowProblem(
            f"response is a list of {len(body)}, and neither the chunks of one stream nor answers of SGLang's "
            "/generate; write one answer per row, as it came"
        )
    if stream.is_chunk(body) or stream.is_chunk(fields):
        raise RowProblem(
            "the answer is one chunk of a stream, which has not all of its tokens; give the list of all chunks as "
            "response"
        )
    if isinstance(body, list):
        return body
    if not isinstance(body, Mapping):
        return fields
    if fields.get("error") or body.get("error") or body.get("status_code", 200) not in (200, None):
        raise RowProblem(f"the request failed ({short(fields.get('error') or body)}); drop the row")
    return body["body"] if isinstance(body.get("body"), Mapping) else body


def _read_samples(fields: Mapping[str, Any], raw: bool, remarks: Remarks) -> list[Recorded]:
    """A dump of slime as one JSON object."""
    samples = fields["samples"]
    if not isinstance(samples, list) or not samples:
        raise RowProblem(f"samples = {short(samples)}; it must be the list of slime's samples, not empty")
    remarks.unread.add(unread_fields(fields, slime.FIELDS))
    found = []
    for k, sample in enumerate(samples):
        try:
            if not isinstance(sample, Mapping) or not slime.is_sample(sample):
                raise RowProblem(
                    f"{short(sample)} is no sample of slime: tokens, response_length, rollout_log_probs"
                )
            remarks.unread.add(unread_fields(sample, slime.FIELDS))
            check_sampling({**fields, **sample}, raw=raw, engine="sglang")
            found.append(slime.from_sample(sample))
        except RowProblem as problem:
            raise RowProblem(f"samples[{k}]: {problem}") from problem
    return found


def _written_by_score(fields: Mapping[str, Any]) -> bool:
    """Whether `score` made the row: its metadata then remembers what became of the log-probs' origin."""
    metadata = parsed(fields.get("metadata"))
    own = "behavior_logprobs" in fields and fields.get("temperature", 1) == 1
    return own and isinstance(metadata, Mapping) and {"source", "backend"} <= set(metadata)
