"""The chat template of a row, with what it is given and what writes turns with it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pear_megatron.data.chat.conversation import Conversation
from pear_megatron.data.chat.ends import find_end, special_texts
from pear_megatron.data.chat.fit import Fitter
from pear_megatron.data.chat.messages import Message
from pear_megatron.data.chat.template import Setting, Template
from pear_megatron.data.chat.turns import THINK_TAGS, TurnWriter
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import short


@dataclass(frozen=True)
class Renderer:
    """Renders the messages of one row."""

    fitter: Fitter
    writer: TurnWriter
    setting: Setting

    def context(self, messages: list[Message], field: str = "messages") -> str:
        """What an inference engine sends for the messages: all of them and the generation prompt."""
        return self.fitter.render(messages, self.setting, prompt=True, field=field)

    def turn(self, message: Message, where: str, context: str, *, truncated: bool) -> str:
        """What the policy wrote after the context."""
        return self.writer.write(message, where, self.setting, context, truncated=truncated)

    def raw(self, response: str, field: str, context: str, *, truncated: bool) -> str:
        """A response as it stands, with its end of turn."""
        return self.writer.write_raw(response, field, self.setting, context, truncated=truncated)


class Renderers:
    """Renderers for a tokenizer's chat templates; what is found out about a template is kept.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat_template: used instead of the tokenizer's own.
        kwargs: arguments of the template for all rows.
        notes: counts what the user should be told.
    """

    def __init__(
        self, tokenizer: Any, chat_template: str | None, kwargs: Mapping[str, Any], notes: Counter[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._own = chat_template
        self._kwargs = dict(kwargs)
        self._notes = notes
        self._known: dict[str, tuple[Fitter, TurnWriter]] = {}

    def of(self, conversation: Conversation) -> Renderer | None:
        """The conversation's renderer; None if there is no chat template and none is needed."""
        setting = self._setting(conversation)
        text = self._template(setting)
        if text is None:
            if setting != Setting():
                raise RowProblem(
                    "tools, documents and chat_template_kwargs need a chat template; there is none"
                )
            return None
        if text not in self._known:
            self._known[text] = self._renderer(text)
        fitter, writer = self._known[text]
        fitter.template.check_kwargs(setting.kwargs)
        return Renderer(fitter, writer, setting)

    def _setting(self, conversation: Conversation) -> Setting:
        given = conversation.chat_template_kwargs or {}
        if not isinstance(given, Mapping):
            raise RowProblem(f"chat_template_kwargs = {short(given)}; it must be an object")
        kwargs = {**self._kwargs, **{name: value for name, value in given.items() if value is not None}}
        return Setting(
            _objects(conversation.tools, "tools"), _objects(conversation.documents, "documents"), kwargs
        )

    def _template(self, setting: Setting) -> str | None:
        if self._own is not None:
            return self._own
        if not self._tokenizer.chat_template:
            return None
        return str(self._tokenizer.get_chat_template(tools=setting.tools))

    def _renderer(self, text: str) -> tuple[Fitter, TurnWriter]:
        fitter = Fitter(Template(self._tokenizer, text))
        special, eos = special_texts(self._tokenizer), self._tokenizer.eos_token
        content, calls = (find_end(fitter, special, eos, calls=calls) for calls in (False, True))
        stops = dict.fromkeys(stop for stop in (content.stop, calls.stop, eos) if stop is not None)
        tokens = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
        around = [token for token in tokens if re.match(r"[^\w\s]", token) and token not in THINK_TAGS]
        return fitter, TurnWriter(fitter, (content, calls), stops, around, self._notes)


def _objects(value: Any, name: str) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            raise RowProblem(
                f"{name} = {short(value)} is a text that is no JSON; give a list of objects"
            ) from None
    if value is None or value == []:
        return None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        try:
            value = [json.loads(item) for item in value]
        except ValueError:
            raise RowProblem(
                f"{name} = {short(value)}; it must be a list of objects, or of their JSON"
            ) from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowProblem(f"{name} = {short(value)}; it must be a list of objects")
    for i, item in enumerate(value):
        function = item.get("function") or item
        if name == "tools" and not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise RowProblem(
                f"tools[{i}] = {short(item)}; it must be a JSON schema of a function with its name"
            )
    return list(value)
