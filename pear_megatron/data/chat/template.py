"""A chat template: messages become text, as an inference engine renders them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pear_megatron.data.chat.messages import Message
from pear_megatron.data.errors import RowProblem

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
_GENERATION_TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_THINKS = re.compile(r"thinking|reasoning|thought")
_STRFTIME = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_GLOBALS = {"raise_exception", "strftime_now", "namespace", "range", "dict"}
_GIVEN_BY_RENDERER = {"messages", "tools", "documents", "add_generation_prompt"}


@dataclass(frozen=True)
class Setting:
    """What a template is given beside the messages."""

    tools: list[Any] | None = None
    documents: list[Any] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Template:
    """A chat template with the special tokens of a tokenizer.

    Attributes:
        text: the template.
        has_marks: whether it has {% generation %} marks.
        thinks_in_fields: whether it has a place for thinking that is not written as <think>.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.text = text
        self.has_marks = bool(_GENERATION_MARK.search(text))
        self.thinks_in_fields = "<think>" not in text and bool(_THINKS.search(_COMMENT.sub("", text)))
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def render(
        self, messages: list[Message], setting: Setting, *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """(text, the spans that the template marks as generated); RowProblem where it refuses the messages."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        kwargs, text = dict(setting.kwargs), self.text
        if (day := kwargs.pop("strftime_now", None)) is not None:
            text = _on_day(text, day)
        try:
            rendered: Any = render_jinja_template(
                conversations=[[_as_template_reads(message) for message in messages]],
                tools=setting.tools,
                documents=setting.documents,
                chat_template=text,
                return_assistant_tokens_mask=marks and self.has_marks,
                add_generation_prompt=prompt,
                **{**self._special, **kwargs},
            )
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise RowProblem(f"messages: the chat template refuses them: {error}; change the row") from error
        (text,), spans = rendered
        return text, spans[0] if spans else []

    def date_in(self, text: str) -> str:
        """Today's date as it stands in a rendering, if the template writes it."""
        now = datetime.now()  # as transformers writes it
        days = (now.strftime(form) for _, form in _STRFTIME.findall(self.text))
        return next((day for day in days if day in text), "")

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """RowProblem on an argument that the template never reads."""
        if not kwargs:
            return
        read, expected = _variables(self.text)
        for name in kwargs:
            if name not in read or name in _GIVEN_BY_RENDERER:
                own = sorted(expected - _GIVEN_BY_RENDERER - _GLOBALS - set(self._special))
                known = f"it reads {', '.join(own)}" if own else "it reads none"
                raise RowProblem(f"chat_template_kwargs: the chat template does not read {name!r}; {known}")


def _on_day(text: str, day: Any) -> str:
    """The template with ``day`` (ISO) where it would write today's date."""
    try:
        then = datetime.fromisoformat(day)
    except (TypeError, ValueError):
        raise RowProblem(
            f"chat_template_kwargs: strftime_now = {day!r}; it must be the day as 2025-08-05"
        ) from None
    return _STRFTIME.sub(lambda call: repr(then.strftime(call[2])), text)


def _variables(template: str) -> tuple[set[str], set[str]]:
    """(names that it reads, those of them that it seems to expect from outside)."""
    from jinja2 import Environment, meta, nodes

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    tree = environment.parse(_GENERATION_TAGS.sub("", template))
    read = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "load"}
    written = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    tests = [test.node for test in tree.find_all(nodes.Test) if test.name == "defined"]
    asked = {node.name for node in tests if isinstance(node, nodes.Name)}
    return read, meta.find_undeclared_variables(tree) & (asked | (read - written))


def _as_template_reads(message: Message) -> Message:
    others = {key: value for key, value in message.items() if key != "weight"}
    if "reasoning_content" in others:  # gpt-oss and LFM read `thinking`
        others["thinking"] = others["reasoning_content"]
    return others
