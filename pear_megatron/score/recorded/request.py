"""What the generator was asked: the request as it stands in a row, or in its ``body``, ``request`` or the like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pear_megatron.data.chat import Conversation
from pear_megatron.data.chat.messages import TEXT_PARTS
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import FUNCTIONS, SYSTEM, get_integers, get_system, short
from pear_megatron.data.text import tools_of

CONTEXT_FIELDS = ("tools", "documents", "chat_template_kwargs")
NO_PROMPT = "no prompt: give the request's messages, prompt or prompt_token_ids beside the answer"
_REQUEST_PLACES = ("body", "request", "request_params", "payload", "extra_body", "responses_create_params")
# What some servers take beside the messages; vLLM takes them in chat_template_kwargs or not at all.
_OF_TEMPLATE = {
    "enable_thinking": "write it into chat_template_kwargs if the server gave it to the template",
    "chat_template": "name it with --chat-template",
}
TEMPLATE_FIELDS = ("reasoning_effort", *_OF_TEMPLATE)
_ID_FIELDS = ("prompt_token_ids", "prompt_ids")
_DAY = 24 * 3600  # seconds; smaller numbers are no time
# Parts whose tokens are text's.
_TEXT_LIKE = ("thinking", "reasoning", "refusal", "tool_use", "tool_call", "tool_result")


@dataclass(frozen=True)
class Request:
    """The context of an answer, in one or several of the ways to give it.

    Attributes:
        messages: of a chat.
        prompt: text; the user's message of a chat, or as it stands for a completion.
        ids: the prompt's token ids.
        context: ``tools``, ``documents``, ``chat_template_kwargs``, those that the row has.
        effort: ``reasoning_effort``, which engines hand on to the chat template.
        system: the columns of the system message, as they stand.
        created: when the answer was made; None where it does not say.
        unread: what keeps the messages from being rendered as they were; None = nothing.
    """

    messages: list[Any] | None
    prompt: str | None
    ids: list[int] | None
    context: Mapping[str, Any]
    effort: Any = None
    system: Mapping[str, Any] = field(default_factory=dict)
    created: datetime | None = None
    unread: str | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Request:
        """The row's request; RowProblem where it has the wrong types."""
        places = list(_places(fields))
        ids = _first(places, _ID_FIELDS)
        prompt = _first(places, ("prompt",))
        messages = _first(places, ("messages",))
        if prompt is None and len(places) > 1:  # SGLang's /generate calls it text, as it does the answer
            prompt = _first(places[1:], ("text",))
        if messages is None and prompt is None:
            messages = _input_messages(places)
        if hasattr(prompt, "tolist"):  # a list of a Parquet column
            prompt = prompt.tolist()
        if prompt == []:  # what a server writes of messages
            prompt = None
        if isinstance(prompt, list):
            if all(isinstance(message, Mapping) for message in prompt):
                messages, prompt = messages or prompt, None
            elif not isinstance(prompt[0], int):
                raise RowProblem(
                    f"prompt is a list of {len(prompt)} prompts; write a row for each, with its own answer"
                )
            else:
                ids, prompt = ids if ids is not None else get_integers({"prompt": prompt}, "prompt"), None
        if (
            ids is None
        ):  # names of SGLang and of vLLM's /inference/v1/generate; in the row itself they are other things
            ids = _first(places[1:], ("input_ids", "token_ids"))
        if messages is not None and not isinstance(messages, list):
            raise RowProblem(f"messages = {short(messages)}; it must be a list of {{role, content}}")
        if messages and all(isinstance(one, list) for one in messages):
            raise RowProblem(
                f"messages is a list of {len(messages)} conversations; write a row for each, with its own answer"
            )
        if prompt is not None and not isinstance(prompt, str):
            raise RowProblem(f"prompt = {short(prompt)}; it must be text, messages or token ids")
        return cls(
            messages,
            prompt,
            None if ids is None else get_integers({"prompt_token_ids": ids}, "prompt_token_ids").tolist(),
            {name: value for name, value in _context(places).items() if value is not None},
            effort=_effort(places),
            system={name: _first(places, (name,)) for name in SYSTEM},
            created=_created(fields),
            unread=_unread(places),
        )

    @property
    def conversation(self) -> Conversation:
        """For the encoder; RowProblem where there are neither messages nor a prompt."""
        if self.messages is None and self.prompt is None:
            raise RowProblem(NO_PROMPT)
        if self.unread is not None:
            raise RowProblem(self.unread)
        return Conversation(
            messages=self.messages, prompt=self.prompt, system=get_system(self.system), **self.context
        )

    @property
    def ends_with_assistant(self) -> bool:
        """Whether the messages are a whole conversation, its answer included."""
        last = self.messages[-1] if self.messages else None
        return isinstance(last, Mapping) and last.get("role") == "assistant"


def refuse_images(messages: Any, name: str = "messages") -> None:
    """RowProblem on a part that is no text: recorded ids hold only its placeholder."""
    for k, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, Mapping) else None
        for j, part in enumerate(content if isinstance(content, list) else []):
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            if kind not in (*TEXT_PARTS, *_TEXT_LIKE):
                raise RowProblem(
                    f"{name}[{k}].content[{j}] = {short(part)} is no text, and its token ids would be placeholders "
                    "that training cannot fill; drop the row"
                )


def _places(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The row, then what of the request stands in it, and in that."""
    yield fields
    for name in _REQUEST_PLACES:
        if isinstance(fields.get(name), Mapping):
            yield from _places(fields[name])


def _context(places: list[Mapping[str, Any]]) -> dict[str, Any]:
    found = {name: _first(places, (name,)) for name in (*CONTEXT_FIELDS, FUNCTIONS)}
    return {name: tools_of(found) if name == "tools" else found[name] for name in CONTEXT_FIELDS}


def _effort(places: list[Mapping[str, Any]]) -> Any:
    reasoning = _first(places, ("reasoning",))  # of Responses
    of_responses = reasoning.get("effort") if isinstance(reasoning, Mapping) else None
    return _first(places, ("reasoning_effort",)) or of_responses


def _created(fields: Mapping[str, Any]) -> datetime | None:
    body = fields.get("response")
    body = body[0] if isinstance(body, list) and body else body  # a stream
    body = body if isinstance(body, Mapping) else fields
    body = body["body"] if isinstance(body.get("body"), Mapping) and body is not fields else body
    seconds = _first([body], ("created", "created_at"))
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds < _DAY:
        return None
    return datetime.fromtimestamp(seconds, UTC)


def _unread(places: list[Mapping[str, Any]]) -> str | None:
    for name, instead in _OF_TEMPLATE.items():
        if (value := _first(places, (name,))) is not None:
            return (
                f"{name} = {short(value)} beside the messages is not read, and the prompt may depend on it: {instead}, "
                "or record the prompt's token ids"
            )
    return None


def _first(places: list[Mapping[str, Any]], names: tuple[str, ...]) -> Any:
    found = (place[name] for place in places for name in names if place.get(name) is not None)
    return next(found, None)


def _input_messages(places: list[Mapping[str, Any]]) -> list[Any] | None:
    """``input`` and ``instructions`` of OpenAI's Responses as messages."""
    given, instructions = _first(places, ("input",)), _first(places, ("instructions",))
    if given is None:
        return None
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise RowProblem(f"input = {short(given)}; it must be text or a list of messages")
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    for k, item in enumerate(items):
        if not isinstance(item, Mapping) or item.get("type", "message") != "message" or "role" not in item:
            raise RowProblem(
                f"input[{k}] = {short(item)} is no message; give the conversation as messages, as the chat template "
                "takes it"
            )
        texts = _texts(item.get("content"), f"input[{k}]")
        parts = [{"type": "text", "text": text} for text in texts]
        messages.append({"role": item["role"], "content": parts if len(texts) > 1 else "".join(texts)})
    return messages


def joined_text(content: Any, place: str) -> str:
    """The text of a content: text, or a list of text parts; RowProblem for any other part."""
    return "".join(_texts(content, place))


def with_lines(messages: list[Any] | None) -> tuple[list[Any] | None, int]:
    """(the messages with a line break between the parts of each, how many of them have several)."""
    found, several = [], 0
    for message in messages or []:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list) and len(content) > 1:
            several += 1
            lines = [part for one in content for part in (one, {"type": "text", "text": "\n"})]
            message = {**message, "content": lines[:-1]}
        found.append(message)
    return (found, several) if several else (messages, 0)


def _texts(content: Any, place: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise RowProblem(f"{place}.content = {short(content)}; it must be text or a list of text parts")
    for k, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RowProblem(f"{place}.content[{k}] = {short(part)} is no text; drop the row")
    return [part["text"] for part in content]
