"""Fields of a row that are not read: those that would change what is learned are refused, the others are named."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

from pear_megatron.data.chat.keys import REASONING
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import FORMS, FUNCTIONS, KNOWN_FIELDS, OF_TEXT, SYSTEM

_BAD_ANSWERS = (
    "give the good answer as a row, and the bad one as a row with a 'reward' below zero, or leave it out"
)
_GRADE = "a grade is a 'reward': 1 trains as ever, below zero trains against the row"
_SYSTEM = "write it as the first message, of role system (a 'prompt' can be a list of messages)"
_TOOLS = "write the functions into 'tools'"
_WORDS = "put it into the prompt, in the words that the policy was given"
_THINKING = "write it where the policy did: into the answer as <think>...</think>, or into its message under this name"
_CUT = 'the response is cut off: write "truncated": true'
# What datasets and programs call things that this package reads under another name, or cannot read.
_WAYS_OUT = {
    **dict.fromkeys(
        ("score", "scores", "rewards", "reward_score", "rating", "advantage", "advantages"), _GRADE
    ),
    **dict.fromkeys(("weight", "weights", "loss_weight", "sample_weight"), _GRADE),
    **dict.fromkeys(
        ("logprobs", "log_probs", "old_logprobs", "old_log_probs"), "did you mean 'behavior_logprobs'?"
    ),
    **dict.fromkeys(("ref_logprobs", "ref_log_probs"), "did you mean 'reference_logprobs'?"),
}
_WAYS_OUT_OF_TEXT = {
    **dict.fromkeys(("system_message", "systemprompt", "systeminstruction"), _SYSTEM),
    **dict.fromkeys(("function", "available_tools", "tool_definitions", "function_definitions"), _TOOLS),
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"), "only text can be trained on; drop the row"
    ),
    **dict.fromkeys(
        ("enable_thinking", "reasoning_effort"),
        "write it into 'chat_template_kwargs' if the template was given it",
    ),
}
# Beside a prompt and a response; conversations hold all of it already.
_WAYS_OUT_OF_PROMPTS = {
    **dict.fromkeys(("input", "context", "instruction"), _WORDS),
    "history": "give the earlier turns in 'prompt', as a list of messages",
}
_NO_FORM = {
    "response": (
        "completion", "output", "answer", "generation", "generated_text", "response_text", "model_output",
        "solution", "generated_solution", "target", "targets",
    ),
    "prompt": ("instruction", "question", "query", "problem", "input", "inputs"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns", "trajectory", "items", "contents"),
}  # fmt: skip
_PREFERENCES = ("chosen", "rejected", "preferred_output", "non_preferred_output", "rejected_response")
_PAGE = "docs/datasets.md has the lines that convert rows of published data sets"
_SETTINGS = ("on", "off", "true", "false", "yes", "no", "none", "low", "medium", "high")
_MAX_NAMED = 12


class UnreadFields:
    """Names of fields that were not read, of all rows, and how many rows had any."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._rows = 0

    def add(self, names: Collection[str]) -> None:
        """Those of one row."""
        self._names |= dict.fromkeys(names)
        self._rows += bool(names)

    @property
    def note(self) -> dict[str, int]:
        """What to tell the user, with the number of rows; empty if every field was read."""
        if not self._names:
            return {}
        names = ", ".join(list(self._names)[:_MAX_NAMED])
        more = f" and {len(self._names) - _MAX_NAMED} more" if len(self._names) > _MAX_NAMED else ""
        return {
            f"rows with fields that are not read ({names}{more}; what is to be kept goes under 'metadata')": self._rows
        }


def form_of(fields: Mapping[str, Any], unread: Collection[str]) -> tuple[str, ...]:
    """The one of FORMS that the row uses, besides ``unread`` names; RowProblem if none, several, or half of one."""
    used = [form for form in FORMS if any(name in fields and name not in unread for name in form)]
    if len(used) != 1:
        found = " and ".join("+".join(form) for form in used) or "none of them"
        raise RowProblem(
            "a row has one of input_ids+loss_mask, messages (or conversations), or prompt+response; this one has "
            f"{found}{f'; keep one ({_PAGE})' if used else way_to_a_form(fields)}"
        )
    for name in used[0]:
        if name not in fields:
            other = next(other for other in used[0] if other in fields)
            raise RowProblem(
                f"missing field {name!r}: {other!r} does not come without it; add it{way_to_a_form(fields)}"
            )
    _check_company(fields, used[0][0])
    return used[0]


def _check_company(fields: Mapping[str, Any], form: str) -> None:
    if form in ("messages", "conversations") and "chosen" in fields and not _is_answered(fields[form]):
        raise RowProblem(f"the answers are not among the {form}: {_BAD_ANSWERS}; {_PAGE}")
    if form != "input_ids":
        if "token_weights" in fields:
            raise RowProblem(
                f"token_weights belongs to tokens, and {form} is text; give input_ids+loss_mask (`pear-megatron score` "
                "writes them), or 'weight' 0 in a message to keep its turn out of training"
            )
        return
    for name in OF_TEXT:
        if name in fields:
            raise RowProblem(
                f"{name} beside input_ids changes nothing: the tokens are there already; put it under 'metadata'"
            )


def unread_names(fields: Mapping[str, Any]) -> list[str]:
    """The names in a row, without its nulls, that nobody reads.

    Raises:
        RowProblem: all those that would change what is learned, or that are misspelt, with what to write instead.
    """
    read = KNOWN_FIELDS if "input_ids" in fields else (*KNOWN_FIELDS, *SYSTEM, FUNCTIONS)
    unread = [name for name, value in fields.items() if name not in read and not _is_empty(value)]
    if unread and (wrong := [said for name in unread if (said := _way_out(name, fields))]):
        raise RowProblem("; ".join(wrong))
    beside = [
        name for name in fields if name == "prompt" and "response" not in fields and _is_conversation(fields)
    ]
    return unread + beside


def way_to_a_form(names: Iterable[str]) -> str:
    """What the fields of a row without a known form may be: the end of a sentence, or nothing."""
    names = list(names)
    meant = {ours: found for ours, theirs in _NO_FORM.items() if (found := [n for n in names if n in theirs])}
    said = [
        f"{ours!r} for {' and '.join(map(repr, found))}" for ours, found in meant.items() if ours not in names
    ]
    if any(name in _PREFERENCES for name in names):
        return f"; {_BAD_ANSWERS}; {_PAGE}"
    if "text" in names and not said:
        return (
            "; 'text' does not say which part of it the policy wrote: give prompt and response, or messages; "
            f"{_PAGE}"
        )
    if "labels" in names and "loss_mask" not in names:
        return "; for 'labels' give loss_mask: 1 where a label is not -100"
    return f"; did you mean {', '.join(said)}? {_PAGE}" if said else ""


def _is_empty(value: Any) -> bool:
    return isinstance(value, (str, list, dict, type(None))) and not value


def _is_conversation(fields: Mapping[str, Any]) -> bool:
    return "messages" in fields or "conversations" in fields


def _is_answered(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return not isinstance(last, dict) or last.get("role", last.get("from")) not in ("user", "human")


def _is_lost_thinking(value: Any, fields: Mapping[str, Any]) -> bool:
    """Of a column that is called as thinking is: whether it is no setting, and the answers have none."""
    answers = str([fields.get(name) for name in ("response", "messages", "conversations")])
    if not isinstance(value, str) or value.lower() in _SETTINGS or "</think>" in answers:
        return False
    return not re.search(rf"'({'|'.join(REASONING)})': ['\"]", answers)


def _way_out(name: str, fields: Mapping[str, Any]) -> str | None:
    value, lower = fields[name], name.lower()
    said = _WAYS_OUT.get(lower)
    if said is None and "input_ids" not in fields:
        said = _WAYS_OUT_OF_TEXT.get(lower)
        if said is None and "prompt" in fields and not _is_conversation(fields):
            said = _WAYS_OUT_OF_PROMPTS.get(lower)
    if lower in REASONING and "input_ids" not in fields and _is_lost_thinking(value, fields):
        said = _THINKING
    if lower in ("label", "labels") and value is False:
        said = _GRADE
    if lower in ("finish_reason", "stop_reason") and value in ("length", "max_tokens"):
        said = None if fields.get("truncated") else _CUT
    if name == "attention_mask" and isinstance(value, list) and not all(value):
        said = "padding was left in: take the ids out where it is 0, from every list"
    if said is None and (near := _misspelt(name, fields)) is not None:
        said = f"did you mean {near!r}?"
    return f"unknown field {name!r}: {said}" if said else None


def _misspelt(name: str, fields: Mapping[str, Any]) -> str | None:
    """The field that the name is nearly, if the row does not have it, nor its text in another form."""
    for known in KNOWN_FIELDS:
        if known not in fields and is_nearly(name, known):
            form = next((form for form in FORMS if known in form), None)
            if form is None or not any(set(other) <= set(fields) for other in FORMS):
                return known
    return None


@lru_cache(4096)
def is_nearly(name: str, known: str) -> bool:
    """Two letters swapped, one wrong, one too many or too few."""
    lower = name.lower().replace("-", "_").strip("_")
    alike = len(known) > 3 and abs(len(lower) - len(known)) <= 1
    return alike and difflib.SequenceMatcher(None, lower, known).ratio() >= 0.8
