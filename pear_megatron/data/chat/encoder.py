"""From a conversation to trajectories: the contexts that the policy was given, and what it sampled in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pear_megatron.data.chat.conversation import Conversation, Encoded
from pear_megatron.data.chat.ends import find_end, special_texts
from pear_megatron.data.chat.fit import Fitter
from pear_megatron.data.chat.marks import check_marks, marked_contexts
from pear_megatron.data.chat.messages import (
    Message,
    check_order,
    is_assistant,
    is_empty,
    read_messages,
    without_nulls,
)
from pear_megatron.data.chat.template import Setting, Template
from pear_megatron.data.chat.turns import TurnWriter, not_doubled
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import short

MultiTurn = Literal["auto", "whole", "split"]
_GIVE_IDS = "or give input_ids+loss_mask as they were sampled"


@dataclass(frozen=True)
class _Turn:
    """A turn that is learned from: its place among the messages and among the assistant's, its text and its tokens."""

    place: int
    number: int
    context: str
    written: str
    response: list[int]


class ChatEncoder:
    """Tokenises text rows as they were sampled.

    The context of an assistant turn is what an inference engine would have sent: the messages before it and the
    generation prompt. The decisions are what the policy wrote after it, tokenised on its own, up to the token that
    ends the turn.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat_template: used instead of the tokenizer's own.
        chat_template_kwargs: arguments of the template for all conversations.
        multi_turn: ``whole`` makes a conversation one trajectory, ``split`` every turn one of its own in the context
            that it was generated in, ``auto`` is whole where that holds the same contexts, else split.

    Attributes:
        special_ids: ids of its special tokens, such as those that end a turn.
        notes: what the user should be told once, with how many times it happened; ``rows split into their turns``
            and ``tokens added by splitting`` among them.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        multi_turn: MultiTurn = "auto",
    ) -> None:
        self._tokenizer = tokenizer
        self._own_template = chat_template
        self._kwargs = dict(chat_template_kwargs or {})
        self._multi_turn = multi_turn
        self._renderers: dict[str, tuple[Fitter, TurnWriter]] = {}
        self._special = special_texts(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = set(tokenizer.all_special_ids) | {i for i, token in added if token.special}
        self.notes: Counter[str] = Counter()

    def encode(self, conversation: Conversation) -> list[Encoded]:
        """The conversation's trajectories, one unless it is split; RowProblem where that is not possible."""
        if conversation.messages is None:
            return [self._encode_raw(conversation)]
        messages = read_messages(conversation.messages)
        check_order(messages)
        setting = self._setting(conversation)
        fitter, writer = self._renderer(setting)
        turns = self._turns(messages, setting, fitter, writer, conversation.truncated)
        split = self._split(turns)
        if len(turns) > 1 and self._multi_turn == "split":
            whole = None
        else:
            whole = self._whole(messages, turns, setting, fitter, writer)
        if whole is not None:
            return [whole]
        if self._multi_turn == "whole":
            raise RowProblem(
                f"messages[{turns[-1].place}]: the chat template renders the turns before it differently once it is "
                "there, so that one row of tokens cannot hold the contexts of all turns; use data.multi_turn=split "
                f"(--multi-turn split) or auto, a template with {{% generation %}} marks, {_GIVE_IDS}"
            )
        self.notes["rows split into their turns"] += 1
        self.notes["tokens added by splitting"] += sum(len(one.input_ids) for one in split[:-1])
        return split

    def generation_prompt(self, conversation: Conversation) -> list[int]:
        """Ids of the context that an inference engine samples in, for all of ``messages``, or for ``prompt``.

        Raises:
            RowProblem: neither is there, or the template cannot render it.
        """
        return self._ids(self._context(conversation)[0])

    def response_ids(
        self, conversation: Conversation, answer: str | Message, *, truncated: bool
    ) -> list[int]:
        """Ids of what the policy answered to ``messages`` or ``prompt``, with its end of turn unless ``truncated``.

        Args:
            conversation: as for :meth:`generation_prompt`; its own ``response`` and ``truncated`` are not read.
            answer: the text as it was sampled, or an assistant message, which the chat template writes.
            truncated: sampling was cut off.

        Raises:
            RowProblem: the answer is empty, or cannot be written.
        """
        context, writer, setting = self._context(conversation)
        if isinstance(answer, str):
            return self._sampled_ids(self._raw(context, answer, writer, truncated, "response"))
        (message,) = read_messages([answer], "answer")
        if not is_assistant(message) or is_empty(message):
            raise RowProblem(
                f"answer = {short(answer)}; it must be an assistant message with text, thinking or calls"
            )
        if writer is None:
            raise RowProblem(
                f"answer: the tokenizer has no chat template to write a message; give one, {_GIVE_IDS}"
            )
        return self._sampled_ids(writer.write(message, "answer[0]", setting, context, truncated=truncated))

    def _encode_raw(self, conversation: Conversation) -> Encoded:
        response = conversation.response
        if not isinstance(response, str):
            raise RowProblem(
                f"response = {short(response)} is a {type(response).__name__}; it must be a string"
            )
        if not response:
            raise RowProblem("response = '' is empty: there is no decision to learn from; drop the row")
        context, writer, _ = self._context(conversation)
        before = self._ids(context) if writer is not None else self._without_eos(context)
        return _joined(
            before,
            self._sampled_ids(self._raw(context, response, writer, conversation.truncated, "response")),
        )

    def _raw(
        self, context: str, response: str, writer: TurnWriter | None, truncated: bool, field: str
    ) -> str:
        if writer is not None:
            return writer.end_raw(not_doubled(context, response), field, truncated=truncated)
        eos = self._tokenizer.eos_token
        if truncated or (eos is not None and response.endswith(eos)):
            return response
        if eos is None:
            raise RowProblem(f"response: the tokenizer has no EOS token to end it; set one, {_GIVE_IDS}")
        return response + str(eos)

    def _context(self, conversation: Conversation) -> tuple[str, TurnWriter | None, Setting]:
        """(text up to the response, what writes a turn or None without a template, the setting)."""
        setting = self._setting(conversation)
        field, value = "messages", conversation.messages
        if value is None:
            field, value = "prompt", conversation.prompt
            if isinstance(value, str):
                if self._template(setting) is None:
                    if setting != Setting():
                        raise RowProblem(
                            "tools, documents and chat_template_kwargs need a chat template; there is none"
                        )
                    return value, None, setting
                value = [{"role": "user", "content": value}]
        messages = read_messages(value, field)
        fitter, writer = self._renderer(setting)
        return fitter.render(messages, setting, prompt=True, field=field), writer, setting

    def _setting(self, conversation: Conversation) -> Setting:
        given = conversation.chat_template_kwargs or {}
        if not isinstance(given, Mapping):
            raise RowProblem(f"chat_template_kwargs = {short(given)}; it must be an object")
        kwargs = {**self._kwargs, **{name: value for name, value in given.items() if value is not None}}
        return Setting(
            _objects(conversation.tools, "tools"), _objects(conversation.documents, "documents"), kwargs
        )

    def _template(self, setting: Setting) -> str | None:
        if self._own_template is not None:
            return self._own_template
        if not self._tokenizer.chat_template:
            return None
        return str(self._tokenizer.get_chat_template(tools=setting.tools))

    def _renderer(self, setting: Setting) -> tuple[Fitter, TurnWriter]:
        text = self._template(setting)
        if text is None:
            raise RowProblem(f"messages: the tokenizer has no chat template; take one that has, {_GIVE_IDS}")
        if text not in self._renderers:
            fitter = Fitter(Template(self._tokenizer, text))
            eos = self._tokenizer.eos_token
            content, calls = (find_end(fitter, self._special, eos, calls=calls) for calls in (False, True))
            stops = dict.fromkeys(stop for stop in (content.stop, calls.stop, eos) if stop is not None)
            self._renderers[text] = fitter, TurnWriter(fitter, (content, calls), stops, self.notes)
        self._renderers[text][0].template.check_kwargs(setting.kwargs)
        return self._renderers[text]

    def _turns(
        self, messages: list[Message], setting: Setting, fitter: Fitter, writer: TurnWriter, truncated: bool
    ) -> list[_Turn]:
        places = [k for k, message in enumerate(messages) if is_assistant(message)]
        turns = []
        for number, k in enumerate(places):
            if is_empty(messages[k]):
                self.notes["assistant turns without text, thinking or calls, which are no decisions"] += 1
            elif messages[k]["weight"]:
                context = fitter.render(messages[:k], setting, prompt=True)
                cut = truncated and k == places[-1]
                written = writer.write(messages[k], f"messages[{k}]", setting, context, truncated=cut)
                turns.append(_Turn(k, number, context, written, self._sampled_ids(written)))
        return turns

    def _split(self, turns: list[_Turn]) -> list[Encoded]:
        return [_joined(self._ids(turn.context), turn.response, turn.number) for turn in turns]

    def _whole(
        self,
        messages: list[Message],
        turns: list[_Turn],
        setting: Setting,
        fitter: Fitter,
        writer: TurnWriter,
    ) -> Encoded | None:
        """The conversation as one trajectory, if that holds every turn in its context."""
        messages = messages[: turns[-1].place + 1]
        try:
            text = fitter.render(messages, setting)
        except RowProblem:  # contexts and turns could be rendered, the conversation with its last turn cannot
            text = ""
        contexts = [turn.context for turn in turns]
        if text and fitter.template.has_marks and self._multi_turn != "split":
            check_marks(fitter, messages, setting)
            marked = marked_contexts(text, contexts, [turn.written for turn in turns], writer)
            if marked is not None and (encoded := self._in_one(turns, marked, text)) is not None:
                return encoded
        return self._in_one(turns, contexts, text)

    def _in_one(self, turns: list[_Turn], contexts: list[str], text: str) -> Encoded | None:
        input_ids = self._ids(contexts[-1]) + turns[-1].response
        rendered = self._ids(text)
        if rendered[: len(input_ids)] == input_ids:
            input_ids = rendered  # with the white space behind the last turn
        mask = [False] * len(input_ids)
        for turn, context in zip(turns, contexts, strict=True):
            before = self._ids(context)
            end = len(before) + len(turn.response)
            if input_ids[:end] != before + turn.response:
                return None
            mask[len(before) : end] = [True] * len(turn.response)
        return Encoded(input_ids, mask)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _sampled_ids(self, text: str) -> list[int]:
        """Ids of a text that begins in the middle, where SentencePiece would put a space before it."""
        newline = self._ids("\n")
        after = self._ids("\n" + text)
        if self._tokenizer.decode(self._ids("a")).startswith("a") or after[: len(newline)] != newline:
            return self._ids(text)
        return after[len(newline) :]

    def _without_eos(self, prompt: str) -> list[int]:
        context = list(self._tokenizer(prompt)["input_ids"])
        return context[:-1] if context and context[-1] == self._tokenizer.eos_token_id else context


def _joined(context: list[int], response: list[int], turn: int | None = None) -> Encoded:
    return Encoded(context + response, [False] * len(context) + [True] * len(response), turn)


def _objects(value: Any, name: str) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowProblem(
                f"{name} = {short(value)} is a text that is no JSON; give a list of objects"
            ) from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowProblem(f"{name} = {short(value)}; it must be a list of objects")
    for i, item in enumerate(value):
        if name == "tools" and not isinstance((item.get("function") or item).get("name"), str):
            raise RowProblem(
                f"tools[{i}] = {short(item)}; it must be a JSON schema of a function with its name"
            )
    return list(without_nulls(value))
