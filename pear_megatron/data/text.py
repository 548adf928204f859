"""Rows of text as tokens: what a recipe says about tokenizer, chat template and turns, applied to one row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pear_megatron.data.chat import ChatEncoder, Conversation
from pear_megatron.data.chat.messages import with_system
from pear_megatron.data.config import DataConfig
from pear_megatron.data.errors import DataError, RowProblem
from pear_megatron.data.fields import FUNCTIONS, get_flag, get_system, get_text, parsed, short
from pear_megatron.data.tokenizer import read_chat_template, tokenizer_hash

# Said by this package's own counts, in more detail.
_COUNTED = ("rows split into their turns", "tokens added by splitting")


@dataclass(frozen=True, eq=False)
class Tokenized:
    """A trajectory's tokens.

    Attributes:
        input_ids: int64 [n].
        loss_mask: bool [n], True on decisions.
        turn: number of its assistant turn, from 0, where every turn is a trajectory of its own.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    turn: int | None = None


class TextReader:
    """Turns rows of text into tokens.

    Args:
        config: the recipe's ``data:`` section.
        tokenizer: a fast Hugging Face tokenizer, or None.

    Attributes:
        tokenizer_hash: of tokenizer, chat template and its arguments; None without a tokenizer.
        encoder: with the template, arguments and ``multi_turn`` of ``config``; None without a tokenizer.
    """

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._template = read_chat_template(config.chat_template)
        self._whole: ChatEncoder | None = None
        self.encoder: ChatEncoder | None = None
        self.tokenizer_hash: str | None = None
        if tokenizer is not None:
            self.encoder = self._make_encoder(config.multi_turn)
            self.tokenizer_hash = tokenizer_hash(tokenizer, self._template, config.chat_template_kwargs)
            return
        for name in ("chat_template", "chat_template_kwargs"):
            if getattr(config, name):
                raise DataError(
                    f"data.{name} is set and data.tokenizer is not: nothing would read it; name the tokenizer"
                )

    @property
    def origin(self) -> str:
        """What the tokenizer's hash was made of, for messages."""
        if self._tokenizer is None:
            return "an earlier row"
        config = self._config
        parts = [f"data.tokenizer = {config.tokenizer!r}"]
        if config.chat_template is not None:
            parts.append(f"data.chat_template = {config.chat_template!r}")
        if config.chat_template_kwargs:
            parts.append(f"data.chat_template_kwargs = {short(config.chat_template_kwargs)}")
        return " with ".join(parts)

    @property
    def notes(self) -> dict[str, int]:
        """What became of the rows that the user should know, and how many times it happened."""
        found = self.encoder.notes.items() if self.encoder is not None else ()
        return {note: count for note, count in found if note not in _COUNTED}

    def encode(self, conversation: Conversation, field: str) -> list[Tokenized]:
        """The row's trajectories, one unless its turns are split."""
        if self.encoder is None:
            raise RowProblem(
                f"{field} is text and data.tokenizer is not set; set it to the model's Hugging Face name "
                "or folder, or give input_ids+loss_mask"
            )
        try:
            return _tokenized(self.encoder, conversation)
        except RowProblem as problem:
            said = _places_of_row(str(problem), conversation)
            raise RowProblem(
                said.replace("messages", field) if field == "conversations" else said
            ) from problem

    def whole(self, conversation: Conversation, parts: list[Tokenized], name: str) -> Tokenized:
        """The row of tokens that begins with each of the ``parts``, to align ``name`` with, or RowProblem."""
        way_out = (
            f"{name} is one list, and the conversation becomes {len(parts)} trajectories (data.multi_turn), whose "
            "contexts no single row of tokens holds: which number belongs to which token is unknown. Take the field "
            "out and score the text again (`pear-megatron score`), or give each turn as a row with input_ids"
        )
        self._whole = self._whole or self._make_encoder("whole")
        try:
            (whole,) = _tokenized(self._whole, conversation)
        except RowProblem as problem:
            raise RowProblem(way_out) from problem
        for part in parts:
            if not np.array_equal(whole.input_ids[: len(part.input_ids)], part.input_ids):
                raise RowProblem(way_out)
        return whole

    def _make_encoder(self, multi_turn: Literal["auto", "whole", "split"]) -> ChatEncoder:
        return ChatEncoder(
            self._tokenizer,
            chat_template=self._template,
            chat_template_kwargs=self._config.chat_template_kwargs,
            multi_turn=multi_turn,
        )


def _tokenized(encoder: ChatEncoder, conversation: Conversation) -> list[Tokenized]:
    return [
        Tokenized(np.array(one.input_ids, dtype=np.int64), np.array(one.loss_mask, dtype=bool), one.turn)
        for one in encoder.encode(conversation)
    ]


def _places_of_row(said: str, conversation: Conversation) -> str:
    """What is said of messages, with their places in the row: its column ``system`` is none of them."""
    given = conversation.messages if conversation.messages is not None else conversation.prompt
    messages = given if isinstance(given, list) else [given]
    if with_system(conversation.system, messages) is messages:
        return said
    return re.sub(
        r"\b(messages|prompt)\[(\d+)\](\.content\b)?",
        lambda m: f"{m[1]}[{int(m[2]) - 1}]{m[3] or ''}" if int(m[2]) else "system",
        said,
    )


def conversation_of(fields: Mapping[str, Any], form: tuple[str, ...]) -> Conversation:
    """A text row's fields, as the encoder takes them."""
    prompt = fields.get("prompt")
    if form[0] == "prompt":
        if not isinstance(prompt, list):
            prompt = get_text(fields, "prompt")
            if _is_messages_as_text(prompt):
                raise RowProblem(
                    "prompt is a list of messages written as JSON text; parse it (json.loads): a list may stand there"
                )
        if isinstance(fields["response"], list) and all(isinstance(one, str) for one in fields["response"]):
            raise RowProblem("response is a list of texts; give each of them as a row with its prompt")
        if isinstance(fields["response"], list):
            raise RowProblem(
                "response is a list; it must be a string: give prompt and response as one list of 'messages'"
            )
        get_text(fields, "response")
    return Conversation(
        messages=fields.get("messages", fields.get("conversations")),
        prompt=prompt,
        response=fields.get("response"),
        system=get_system(fields),
        tools=tools_of(fields),
        documents=fields.get("documents"),
        chat_template_kwargs=_object(fields, "chat_template_kwargs"),
        truncated=get_flag(fields, "truncated"),
    )


def tools_of(fields: Mapping[str, Any]) -> Any:
    """``tools``, or ``functions``, which are the same without their envelopes."""
    tools, functions = fields.get("tools"), fields.get(FUNCTIONS)
    if not functions:
        return tools
    if tools:
        raise RowProblem("tools and functions are both there; keep one")
    found = parsed(functions)
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and "function" not in one for one in found
    ):
        raise RowProblem(
            f"functions = {short(functions)}; it must be a list of {{name, description, parameters}}, or write 'tools'"
        )
    return [{"type": "function", "function": one} for one in found]


def _is_messages_as_text(text: str) -> bool:
    if not (text.lstrip().startswith("[") and '"role"' in text):
        return False
    found = parsed(text)
    return isinstance(found, list) and all(isinstance(one, dict) and "role" in one for one in found)


def _object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    value = fields.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowProblem(f"{name} = {short(value)} is no JSON; it must be an object, {{...}}") from None
    if value is not None and not isinstance(value, Mapping):
        raise RowProblem(
            f"{name} = {short(value)} is a {type(value).__name__}; it must be an object, {{...}}"
        )
    return value
