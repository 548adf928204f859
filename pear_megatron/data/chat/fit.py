"""The form in which a chat template renders every part of the messages, found out with words in place of the texts.

Templates differ in what they take: content as a string or as a list of parts, an absent text beside tool calls as
"" or null, arguments as an object or as JSON. A form is tried on a conversation of the same shape whose texts are
words that stand nowhere else, so that a text which happens to be in the template hides no loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pear_megatron.data.chat.messages import Message, is_assistant, parts_of
from pear_megatron.data.chat.template import Setting, Template
from pear_megatron.data.errors import RowProblem

MOST_KNOWN = 4096  # shapes that are remembered
_HEAD_TAG = re.compile(r"\s*(<[^<>\s]+>)")
_WRITES_IDS = re.compile(r"\.id\b|\[.id.\]")
_OTHER_ROLES = {"function": "tool", "developer": "system"}
_CHANGE = "use a chat template that renders it, or change the row"


@dataclass(frozen=True)
class Form:
    """How messages are put before a template."""

    content_is_list: bool = False
    absent_is_null: bool = False
    arguments_are_json: bool = False

    def __call__(self, messages: list[Message]) -> list[Message]:
        """The messages in this form."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        message = dict(message)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [self._call(call) for call in calls]
        if calls and not message["content"] and self.absent_is_null:
            message["content"] = None
        elif self.content_is_list:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    def _call(self, call: Message) -> Message:
        arguments = call["function"]["arguments"]
        if self.arguments_are_json and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}


@dataclass
class _Words:
    """Words given out, and the names of what they stand for."""

    names: dict[str, str]

    def instead_of(self, text: str, name: str) -> str:
        if not text.strip():
            return text
        word = f"Zq{len(self.names)}x"
        self.names[word] = name
        return word

    def in_leaves(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: self.in_leaves(inner, name) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.in_leaves(inner, name) for inner in value]
        return self.instead_of(value, name) if isinstance(value, str) else value


class Fitter:
    """Renders messages in the form in which a template loses nothing.

    Args:
        template: the chat template.
    """

    def __init__(self, template: Template) -> None:
        self.template = template
        self._known: dict[str, Form | str] = {}

    def render(
        self, messages: list[Message], setting: Setting, *, prompt: bool = False, field: str = "messages"
    ) -> str:
        """The text, with the generation prompt if ``prompt``; RowProblem where more than thinking is left out."""
        places = places_of(messages, field)
        form = self.form(messages, setting, prompt=prompt, places=places)
        text, _ = self.template.render(form(messages), setting, prompt=prompt)
        for place, message in zip(places, messages, strict=True):
            for part in parts_of(message, place):
                if not part.thinking and not stands_in(part.text, text):
                    raise RowProblem(
                        f"{part.name}: the chat template leaves the text out or changes it; {_CHANGE}"
                    )
                if not part.thinking and (tag := _tag_twice(part.text, text)):
                    raise RowProblem(
                        f"{part.name} begins with {tag!r}, which the chat template writes before it: it would stand "
                        "there twice; take the tags off the text"
                    )
        return text

    def form(
        self, messages: list[Message], setting: Setting, *, prompt: bool, places: list[str] | None = None
    ) -> Form:
        """The first form in which every part is rendered; RowProblem, with the message's place, if there is none."""
        places = places or places_of(messages, "messages")
        words = _Words({})
        shape, needed = _shape(messages, words, places)
        given = _shape_of_setting(setting, words)
        needed |= set(words.names) - _all_words(shape)
        key = json.dumps(
            [shape, given.tools, given.documents, dict(given.kwargs), prompt, places], default=str
        )
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._try(shape, given, prompt, needed, words.names)
        found = self._known[key]
        if isinstance(found, str):
            raise RowProblem(found)
        return found

    def marked(self, messages: list[Message], setting: Setting) -> list[tuple[str, bool, bool]]:
        """(name of a part, is it marked as generated, is it an assistant's) of every part but thinking."""
        words = _Words({})
        shape, needed = _shape(messages, words, places_of(messages, "messages"))
        form = self.form(messages, setting, prompt=False)
        text, spans = self.template.render(form(shape), setting, marks=True)
        marked = "\n".join(text[start:end] for start, end in spans)
        written = [_all_words(message) if is_assistant(message) else set() for message in shape]
        return [
            (name, word in marked, word in set().union(*written))
            for word, name in words.names.items()
            if word in needed
        ]

    def _try(
        self, shape: list[Message], setting: Setting, prompt: bool, needed: set[str], names: dict[str, str]
    ) -> Form | str:
        refusal, lost = "", None
        for form in _forms(shape):
            try:
                text, _ = self.template.render(form(shape), setting, prompt=prompt)
            except RowProblem as problem:
                refusal = refusal or str(problem)
                continue
            missing = [word for word in names if word in needed and word not in text]
            if not missing and not _shows_python(text):
                return form
            lost = missing if lost is None or len(missing) < len(lost) else lost
        if not lost:
            return (
                refusal or "messages: the chat template renders them as Python objects; use another template"
            )
        way_out = _CHANGE
        if names[lost[0]].endswith("function.name") and _WRITES_IDS.search(self.template.text):
            way_out = f"it writes a call's id, which may hold the name (functions.NAME:0); {_CHANGE}"
        for role, other in _OTHER_ROLES.items():
            if names[lost[0]].endswith(f"(role {role!r})"):
                way_out = f"write {other!r} for {role!r} if that is the same to it; {_CHANGE}"
        return f"{names[lost[0]]}: the chat template leaves it out; {way_out}"


def places_of(messages: list[Message], field: str) -> list[str]:
    """``field[0]``, ``field[1]``, ..."""
    return [f"{field}[{k}]" for k in range(len(messages))]


def stands_in(text: str, rendering: str) -> bool:
    """Whether the text is in the rendering, but for white space at its ends; as JSON writes it counts too."""
    text = text.strip()
    if text in rendering or text in ("true", "false", "null"):  # which a template may write as Python does
        return True
    return any(json.dumps(text, ensure_ascii=ascii)[1:-1] in rendering for ascii in (True, False))


def _tag_twice(text: str, rendering: str) -> str:
    """The tag at the head of the text, if the rendering has the same one before it."""
    tag = _HEAD_TAG.match(text)
    doubled = tag and re.search(re.escape(tag[1]) + r"\s*" + re.escape(text.strip()), rendering)
    return tag[1] if tag and doubled else ""


def _forms(messages: list[Message]) -> Iterator[Form]:
    calls = [message for message in messages if message.get("tool_calls")]
    absent = [False, True] if any(not message["content"] for message in calls) else [False]
    for is_list in (False, True):
        for is_null in absent:
            for are_json in (False, True) if calls else (False,):
                yield Form(is_list, is_null, are_json)


def _shape(messages: list[Message], words: _Words, places: list[str]) -> tuple[list[Message], set[str]]:
    """(messages with words for texts, the words that must be rendered: all but thinking)."""
    shape, exempt = [], set()
    ids: dict[str, Any] = {}
    for place, message in zip(places, messages, strict=True):
        role = "" if message["role"] in ("system", "user", "assistant") else f" (role {message['role']!r})"
        copy = {**message, "weight": 1}
        if "reasoning_content" in message:
            copy["reasoning_content"] = words.instead_of(message["reasoning_content"], "")
            exempt.add(copy["reasoning_content"])
        copy["content"] = words.instead_of(message["content"], f"{place}.content{role}")
        if is_assistant(message) and not any(
            p.name.endswith("content") and not p.thinking for p in parts_of(message, "")
        ):
            exempt.add(copy["content"])
        if calls := message.get("tool_calls"):
            copy["tool_calls"] = [
                _shape_of_call(c, words, f"{place}.tool_calls[{i}]") for i, c in enumerate(calls)
            ]
            ids |= {str(c.get("id")): new.get("id") for c, new in zip(calls, copy["tool_calls"], strict=True)}
        if str(answered := message.get("tool_call_id")) in ids:
            copy["tool_call_id"] = ids[str(answered)]
        shape.append(copy)
    return shape, set(words.names) - exempt


def _shape_of_call(call: Message, words: _Words, where: str) -> Message:
    function = call["function"]
    name = words.instead_of(function["name"], f"{where}.function.name")
    arguments = words.in_leaves(function["arguments"], f"{where}.function.arguments")
    shape = {**call, "function": {**function, "name": name, "arguments": arguments}}
    if isinstance(call.get("id"), str) and function["name"].strip():  # Kimi-K2 writes functions.NAME:0 alone
        shape["id"] = re.sub(rf"\b{re.escape(function['name'])}\b", name, call["id"])
    return shape


def _shape_of_setting(setting: Setting, words: _Words) -> Setting:
    tools = (
        None
        if setting.tools is None
        else [_shape_of_tool(t, words, f"tools[{i}]") for i, t in enumerate(setting.tools)]
    )
    documents = setting.documents
    if documents is not None:
        documents = [
            {
                key: value if "id" in key else words.in_leaves(value, f"documents[{i}].{key}")
                for key, value in d.items()
            }
            for i, d in enumerate(documents)
        ]
    return replace(setting, tools=tools, documents=documents)


def _shape_of_tool(tool: Message, words: _Words, where: str) -> Message:
    if isinstance(function := tool.get("function"), dict):
        return {**tool, "function": _shape_of_tool(function, words, f"{where}.function")}
    return {**tool, "name": words.instead_of(tool["name"], f"{where}.name")}


def _all_words(shape: Any) -> set[str]:
    return set(re.findall(r"Zq\d+x", json.dumps(shape, default=str)))


def _shows_python(text: str) -> bool:
    return "{'type': 'text'" in text
