"""Whether recorded log-probs can be those of the policy at temperature 1, by the sampling parameters beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import parsed, short

# Where engines, clients, batch files and rollout dumps keep the parameters of a request, within one another too. Those
# of a judge, a tool or a retriever have other names, and are none of this answer's.
_SETTINGS = "(?:params|parameters|args|kwargs|config|options|settings)"
_SAMPLING_PLACE = re.compile(
    "sampling|extra_body|params|parameters|model_(?:params|parameters|args|kwargs)|hyper_?(?:params|parameters)"
    f"|(?:sampling|generation|generate|gen|request|invocation|inference|decoding|completion|llm|rollout|vllm|sglang)_{_SETTINGS}"
)
_GENERAL_PLACE = re.compile(f"{_SETTINGS}|payload|json")  # in metadata they may be about anything
_PLACES = ("body", "request", "response", "metadata", "meta_info", "manifest", "responses_create_params")

# Numbers, with the value at which they do nothing; top_k has several.
_WHOLE_VOCABULARY = 1 << 20  # SGLang writes 2**30 for "no top-k"; no vocabulary is as large
_SHAPING = {"temperature": 1, "top_p": 1, "min_p": 0, "typical_p": 1}
_PENALTIES = {
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "min_tokens": 0,  # forbids the end of turn until then
    "min_new_tokens": 0,
}
_NEUTRAL = _SHAPING | _PENALTIES
_FORBIDDING = (
    "logit_bias",
    "bad_words",
    "bad_words_ids",
    "allowed_token_ids",
    "suppress_tokens",
    "custom_logit_processor",
    "logits_processors",
)
# Structured decoding masks the logits in the engine's model runner: even vLLM's raw log-probs come after it.
_MASKING = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding",
    "structured_outputs",
)
# Requests that servers answer by structured decoding.
_ASKING_FOR_A_FORM = ("response_format", "text", "tool_choice")
# Common words, which mean structured decoding only among sampling parameters.
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag", "grammar")
_TRACE_OF_TOP_P = "rollout_top_p_token_ids"  # slime keeps what top-p left
_BEFORE_LOGGING = (*_MASKING, *_GRAMMARS, *_ASKING_FOR_A_FORM)
_BEFORE_LOGGING_IN_SGLANG = (*_BEFORE_LOGGING, *_PENALTIES, *_FORBIDDING)
_KEYS = (*_NEUTRAL, "top_k", "do_sample", "use_beam_search", *_FORBIDDING, *_MASKING)
_SETS_A_KEY = re.compile(rf"\b(?:{'|'.join(_KEYS)})\b['\"]?\s*[=:]")
_MODES = ("raw_logprobs", "processed_logprobs")


def check_sampling(fields: Mapping[str, Any], *, raw: bool, engine: str | None = None) -> None:
    """Raise RowProblem if the log-probs may be those of a tempered, truncated or otherwise changed distribution.

    Args:
        fields: the row, with the request and the answer where the format keeps them.
        raw: the user says that the engine logged the model's own log-probs; a row's ``logprobs_mode`` goes first.
        engine: ``sglang`` if it wrote the log-probs: what it calls original has penalties and bias in as well.
    """
    places = dict(_places(fields, ""))
    for name, place in places.items():
        _refuse_text(name, place)
    raw = _says_raw(places, raw)
    changed = [
        (_snake(key), f"{_joined(name, key)} = {short(value)}")
        for name, place in places.items()
        for key, value in place.items()
        if value is not None and _changes(key, value, name)
    ]
    if raw:
        before = _BEFORE_LOGGING_IN_SGLANG if engine == "sglang" else _BEFORE_LOGGING
        changed = [(key, said) for key, said in changed if key in before]
        if changed:
            raise RowProblem(
                f"{_listed(changed)}: {'SGLang' if engine == 'sglang' else 'the engine'} changes the logits by this "
                "before it logs them, so that its raw log-probs are not the model's own either; sample without it, or "
                "score with --model"
            )
        return
    if changed:
        raise RowProblem(
            f"{_listed(changed)}: log-probs must be those of the policy at temperature 1 over its whole vocabulary, "
            "and recorded ones are that only if the engine logs raw ones (vLLM's logprobs_mode raw_logprobs, its "
            "default; not SGLang's default). If it did, give --raw-logprobs, or logprobs_mode = 'raw_logprobs' in "
            "the row; otherwise score with --model"
        )


def is_of_sampling(name: str) -> bool:
    """Whether `check_sampling` reads a field of this name."""
    name = _snake(name)
    return (
        name in (*_PLACES, *_KEYS, *_BEFORE_LOGGING, _TRACE_OF_TOP_P)
        or _SAMPLING_PLACE.fullmatch(name) is not None
        or _GENERAL_PLACE.fullmatch(name) is not None
    )


def _places(fields: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield name, fields
    of_user = "metadata" in name.split(".")
    for key, value in fields.items():
        known = _snake(key)
        sampling = _SAMPLING_PLACE.fullmatch(known)
        if known in _PLACES or sampling or (not of_user and _GENERAL_PLACE.fullmatch(known)):
            found = parsed(value) if key == "metadata" or sampling else value
            if isinstance(found, Mapping):
                yield from _places(found, _joined(name, key))


def _refuse_text(name: str, place: Mapping[str, Any]) -> None:
    """RowProblem on parameters that stand as the text of an object, such as ``SamplingParams(temperature=0.7)``."""
    for key, value in place.items():
        text = isinstance(value, str) and not isinstance(parsed(value), Mapping)
        if text and _SAMPLING_PLACE.fullmatch(_snake(key)) and _SETS_A_KEY.search(value):
            raise RowProblem(
                f"{_joined(name, key)} = {short(value)} is the text of an object; write "
                'the parameters that were used as JSON, such as {"temperature": 1.0, "top_p": 1.0}'
            )


def _says_raw(places: Mapping[str, Mapping[str, Any]], raw: bool) -> bool:
    said: dict[str, str] = {}
    for name, place in places.items():
        mode = place.get("logprobs_mode")
        if mode is None:
            continue
        if mode not in _MODES:
            raise RowProblem(
                f"{_joined(name, 'logprobs_mode')} = {short(mode)}; it must be {' or '.join(_MODES)}: logits are no "
                "log-probs, score with --model"
            )
        said[mode] = _joined(name, "logprobs_mode")
    if len(said) > 1:
        raise RowProblem(f"{' and '.join(said.values())} contradict each other; keep the one that is true")
    return "raw_logprobs" in said if said else raw


def _changes(key: str, value: Any, place: str) -> bool:
    """Whether the parameter makes another distribution of the model's."""
    said, key = key, _snake(key)
    if key in _NEUTRAL or key == "top_k":
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            if "metadata" in place.split("."):  # of something else
                return False
            raise RowProblem(
                f"{_joined(place, said)} = {short(value)} is no number; write the one that was used"
            )
        return 0 < value < _WHOLE_VOCABULARY if key == "top_k" else value != _NEUTRAL[key]
    if key in _FORBIDDING or key in _MASKING or key == _TRACE_OF_TOP_P:
        return bool(value)
    if key in _GRAMMARS:
        return bool(value) and _SAMPLING_PLACE.fullmatch(_snake(place.rpartition(".")[2])) is not None
    if key in ("response_format", "text"):  # chat completions' and Responses' ways to ask for JSON
        wanted = value.get("format") if key == "text" and isinstance(value, Mapping) else value
        return isinstance(wanted, Mapping) and wanted.get("type", "text") != "text"
    if key == "tool_choice":
        return isinstance(value, Mapping) or value == "required"
    return (key == "do_sample" and value is False) or (key == "use_beam_search" and value is True)


def _snake(name: str) -> str:
    """``top_p`` of topP."""
    return re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _listed(changed: list[tuple[str, str]]) -> str:
    return ", ".join(said for _, said in changed)


def _joined(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
