"""From a conversation to trajectories: the contexts that the policy was given, and what it sampled in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pear_megatron.data.chat.conversation import Conversation, Encoded
from pear_megatron.data.chat.ends import special_texts
from pear_megatron.data.chat.fit import places_of
from pear_megatron.data.chat.keys import unread_keys
from pear_megatron.data.chat.marks import check_marks, marked_contexts
from pear_megatron.data.chat.messages import (
    Message,
    check_order,
    has_nulls,
    is_assistant,
    is_empty,
    parts_of,
    read_messages,
    unseen_changes,
    with_system,
)
from pear_megatron.data.chat.renderers import Renderer, Renderers
from pear_megatron.data.chat.turns import check_stops, check_thinking
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import check_encodable, short

MultiTurn = Literal["auto", "whole", "split"]
_GIVE_IDS = "or give input_ids+loss_mask as they were sampled"
_FRAMED = re.compile(r"(\[/INST\]|\b(Assistant|ASSISTANT|Response):|<\|assistant\|>)\s*$")
_FOREIGN_THINKING = re.compile(r"\s*(<thinking>|<thought>|<reasoning>|<\|begin_of_thought\|>|\[THINK\])")
_MOST_KEYS = 8  # that are named in notes


@dataclass(frozen=True)
class _Turn:
    """A turn that is learned from: its place among the messages and among the assistant's, its text and its tokens."""

    place: int
    number: int
    context: str
    written: str
    before: list[int]
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
        self._multi_turn = multi_turn
        self._special = special_texts(tokenizer)
        self._space_first = self._puts_a_space_first()
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = set(tokenizer.all_special_ids) | {i for i, token in added if token.special}
        self.notes: Counter[str] = Counter()
        self._keys: dict[str, None] = {}  # those named in notes
        self._renderers = Renderers(tokenizer, chat_template, chat_template_kwargs or {}, self.notes)

    def encode(self, conversation: Conversation) -> list[Encoded]:
        """The conversation's trajectories, one unless it is split; RowProblem where that is not possible."""
        if conversation.messages is None:
            return [self._encode_raw(conversation)]
        messages = read_messages(with_system(conversation.system, conversation.messages))
        check_order(messages)
        renderer = self._needed(conversation)
        self._look_at(messages, "messages", renderer)
        messages = renderer.writer.with_thinking_apart(messages, renderer.setting)
        turns = self._turns(messages, renderer, conversation.truncated)
        self._note_context(turns[-1].context, conversation.messages, renderer)
        if turns[-1].place < len(messages) - 1:
            self.notes["rows whose messages after the last turn that is learned from are left out"] += 1
        if len(turns) == 1 or self._multi_turn != "split":
            whole = self._whole(messages[: turns[-1].place + 1], turns, renderer)
            if whole is not None:
                return [whole]
        if self._multi_turn == "whole":
            raise RowProblem(
                f"messages[{turns[-1].place}]: the chat template renders the turns before it differently once it is "
                "there, so that one row of tokens cannot hold the contexts of all turns; use data.multi_turn=split "
                f"(--multi-turn split) or auto, a template with {{% generation %}} marks, {_GIVE_IDS}"
            )
        self.notes["rows split into their turns"] += 1
        split = [_joined(turn.before, turn.response, turn.number) for turn in turns]
        self.notes["tokens added by splitting"] += sum(len(one.input_ids) for one in split[:-1])
        return split

    def generation_prompt(self, conversation: Conversation) -> list[int]:
        """Ids of the context that an inference engine samples in, for all of ``messages``, or for ``prompt``."""
        return self._ids(self._context(conversation, noted=True)[0])

    def template_text(self, conversation: Conversation) -> str | None:
        """The chat template that renders the conversation; None where there is none."""
        renderer = self._renderers.of(conversation)
        return None if renderer is None else renderer.fitter.template.text

    def response_ids(
        self, conversation: Conversation, answer: str | Message, *, truncated: bool
    ) -> list[int]:
        """Ids of what the policy answered to ``messages`` or ``prompt``, with its end of turn unless ``truncated``.

        Args:
            conversation: as for :meth:`generation_prompt`; its own ``response`` and ``truncated`` are not read.
            answer: the text as it was sampled, or an assistant message, which the chat template writes.
            truncated: sampling was cut off.
        """
        context, renderer = self._context(conversation)
        if isinstance(answer, str):
            return self._sampled_ids(self._raw(context, answer, renderer, truncated))
        (message,) = read_messages([answer], "answer")
        if not is_assistant(message) or is_empty(message):
            raise RowProblem(
                f"answer = {short(answer)}; it must be an assistant message with text, thinking or calls"
            )
        if renderer is None:
            raise RowProblem(
                f"answer: the tokenizer has no chat template to write a message; give one, {_GIVE_IDS}"
            )
        (message,) = renderer.writer.with_thinking_apart([message], renderer.setting)
        return self._sampled_ids(renderer.turn(message, "answer[0]", context, truncated=truncated))

    def _encode_raw(self, conversation: Conversation) -> Encoded:
        response = conversation.response
        if not isinstance(response, str):
            raise RowProblem(
                f"response = {short(response)} is a {type(response).__name__}; it must be a string"
            )
        if not response:
            raise RowProblem("response = '' is empty: there is no decision to learn from; drop the row")
        check_encodable("response", response)
        context, renderer = self._context(conversation, noted=True)
        before = self._ids(context) if renderer is not None else self._raw_context(context)
        raw = self._raw(context, response, renderer, conversation.truncated)
        if renderer is not None:
            self._note_context(context, conversation.prompt, renderer)
        ended = raw.endswith(response)  # else its end has been written behind it
        if any(token in (response.removesuffix(token) if ended else response) for token in self._special):
            self.notes["responses with a special token before their end, which becomes that token"] += 1
        return _joined(before, self._sampled_ids(raw))

    def _raw(self, context: str, response: str, renderer: Renderer | None, truncated: bool) -> str:
        if renderer is None:
            check_thinking(context, response, "response", self.notes, truncated=truncated)
            return self._ended_by_eos(response, truncated)
        return renderer.raw(response, "response", context, truncated=truncated)

    def _ended_by_eos(self, response: str, truncated: bool) -> str:
        eos = self._tokenizer.eos_token
        body = response.removesuffix(eos or "")
        check_stops(body, "response", [eos] if eos else [])
        if truncated or body != response:
            return response
        if eos is None:
            raise RowProblem(f"response: the tokenizer has no EOS token to end it; set one, {_GIVE_IDS}")
        return response + str(eos)

    def _context(self, conversation: Conversation, *, noted: bool = False) -> tuple[str, Renderer | None]:
        """(text up to the response, its renderer or None without a chat template)."""
        field, value = "messages", conversation.messages
        if value is None:
            field, value = "prompt", conversation.prompt
        if isinstance(value, str) and field == "prompt":
            check_encodable("prompt", value)
            renderer = self._renderers.of(conversation)
            if renderer is None and conversation.system:
                raise RowProblem(f"system: the tokenizer has no chat template to write it with; {_GIVE_IDS}")
            if renderer is None:
                return value, None
            self._refuse_rendered(value, renderer)
            if noted and _FRAMED.search(value):
                self.notes[
                    "prompts that end as another template's do ('Assistant:', '[/INST]'), within the user's turn"
                ] += 1
            value = [{"role": "user", "content": value}]
        messages = read_messages(with_system(conversation.system, value), field)
        if field == "prompt" and messages and is_assistant(messages[-1]):
            raise RowProblem(
                f"prompt[{len(messages) - 1}] is an assistant message, and the response would begin another assistant "
                "turn behind it; end the prompt with a user or tool message, or give messages"
            )
        renderer = self._needed(conversation)
        self._look_at(messages, field, renderer, noted=noted)
        messages = renderer.writer.with_thinking_apart(messages, renderer.setting)
        return renderer.context(messages, field), renderer

    def _refuse_rendered(self, prompt: str, renderer: Renderer) -> None:
        if mark := renderer.writer.mark_of_rendering(prompt):
            raise RowProblem(
                f"prompt {mark}, as a prompt that is rendered already, and the chat template would be put around it "
                "once more; give the prompt's messages, a list of {role, content}, "
                f"{_GIVE_IDS}"
            )

    def _needed(self, conversation: Conversation) -> Renderer:
        renderer = self._renderers.of(conversation)
        if renderer is None:
            raise RowProblem(f"messages: the tokenizer has no chat template; take one that has, {_GIVE_IDS}")
        return renderer

    def _turns(self, messages: list[Message], renderer: Renderer, truncated: bool) -> list[_Turn]:
        places = [k for k, message in enumerate(messages) if is_assistant(message)]
        turns = []
        for number, k in enumerate(places):
            if is_empty(messages[k]):
                self.notes["assistant turns without text, thinking or calls, which are no decisions"] += 1
            elif messages[k]["weight"]:
                context = renderer.context(messages[:k])
                cut = truncated and k == places[-1]
                written = renderer.turn(messages[k], f"messages[{k}]", context, truncated=cut)
                before, response = self._ids(context), self._sampled_ids(written)
                turns.append(_Turn(k, number, context, written, before, response))
        return turns

    def _note_context(self, context: str, given: Any, renderer: Renderer) -> None:
        """Counts what of ``given``, the row's messages or prompt, is another in the context, or is not the row's."""
        if isinstance(given, list):
            self.notes.update(note for message in given for note in unseen_changes(message))
        if any("function" not in tool for tool in renderer.setting.tools or []):
            self.notes[
                "rows whose tools stand in the prompt as they are, without the {type, function: {...}} around each in "
                "which engines hand them on"
            ] += 1
        if has_nulls(renderer.setting.tools or []):
            self.notes["rows whose tools have null in their schemas, which stands there"] += 1
        if day := renderer.fitter.template.date_in(context):
            self.notes[
                f"rows in whose context the chat template writes today's date, {day}; a template with the date of "
                "sampling in it (data.chat_template) keeps that"
            ] += 1

    def _look_at(
        self, messages: list[Message], field: str, renderer: Renderer, *, noted: bool = True
    ) -> None:
        """Refuses text that no file can hold; counts what is in the messages that the user may not have meant."""
        for place, message in zip(places_of(messages, field), messages, strict=True):
            parts = list(parts_of(message, place))
            for part in parts:
                check_encodable(part.name, part.text)
            if not noted:
                continue
            if any(token in part.text for part in parts for token in self._special):
                self.notes["messages whose text contains a special token, which becomes that token"] += 1
            if any(has_nulls(call["function"]["arguments"]) for call in message.get("tool_calls", ())):
                self.notes["messages whose calls have null among their arguments, which stands there"] += 1
            role = message["role"]
            if role == "user" and not message["content"].strip():
                self.notes["messages of the user without text, whose turns are empty in the context"] += 1
            if message.get("tool_calls") and not renderer.setting.tools:
                self.notes[
                    "messages with calls in rows without 'tools', in whose prompt the functions may not be"
                ] += 1
            tag = _FOREIGN_THINKING.match(message["content"]) if role == "assistant" else None
            if tag and tag[1] not in renderer.fitter.template.text:
                self.notes[
                    f"answers that begin with {tag[1]}, which is text to the chat template, no thinking"
                ] += 1
            if message.get("name") and role != "tool" and not renderer.writer.writes_name(role):
                self.notes["messages with a 'name' that the chat template does not write"] += 1
            for key in unread_keys(message, renderer.fitter.template.text):
                self._keys = dict.fromkeys([*self._keys, key][:_MOST_KEYS])
                name = short(key) if key in self._keys else "a key of some other name"
                self.notes[f"messages with {name}, which is not read"] += 1

    def _whole(self, messages: list[Message], turns: list[_Turn], renderer: Renderer) -> Encoded | None:
        """The conversation as one trajectory, if that holds every turn in its context."""
        fitter, setting = renderer.fitter, renderer.setting
        try:
            text = fitter.render(messages, setting)
        except RowProblem:  # contexts and turns could be rendered, the conversation with its last turn cannot
            text = ""
        if text and fitter.template.has_marks and self._multi_turn != "split":
            check_marks(fitter, messages, setting)
        if text and fitter.template.has_marks and self._multi_turn == "whole":
            pairs = [(turn.context, turn.written) for turn in turns]
            marked = marked_contexts(text, pairs, renderer.writer)
            encoded = self._in_one(turns, [self._ids(one) for one in marked], text) if marked else None
            if encoded is not None:
                return encoded
        return self._in_one(turns, [turn.before for turn in turns], text)

    def _in_one(self, turns: list[_Turn], contexts: list[list[int]], text: str) -> Encoded | None:
        input_ids = contexts[-1] + turns[-1].response
        if len(turns) > 1 and (rendered := self._ids(text))[: len(input_ids)] == input_ids:
            input_ids = rendered  # as the template has it, with the white space behind the last turn
        mask = [False] * len(input_ids)
        for turn, before in zip(turns, contexts, strict=True):
            end = len(before) + len(turn.response)
            if input_ids[:end] != before + turn.response:
                return None
            mask[len(before) : end] = [True] * len(turn.response)
        return Encoded(input_ids, mask)

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # what the tokenizers library raises has no class of its own
            raise RowProblem(f"the tokenizer cannot encode {short(text)}: {error}; {_GIVE_IDS}") from error

    def _puts_a_space_first(self) -> bool:
        try:
            first = self._tokenizer.convert_ids_to_tokens(self._ids("a"))[:1]
        except RowProblem:  # a vocabulary of whole words, without "a"
            return False
        return any(token.startswith("\u2581") for token in first)

    def _sampled_ids(self, text: str) -> list[int]:
        """Ids of a text that begins in the middle, where SentencePiece would put a space before it."""
        ids = self._ids(text)
        if self._space_first:
            newline, after = self._ids("\n"), self._ids("\n" + text)
            if after[: len(newline)] == newline:
                ids = after[len(newline) :]
        if self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            self.notes[
                "responses that the tokenizer changes, for it normalises or has no token for a character"
            ] += 1
        return ids

    def _raw_context(self, prompt: str) -> list[int]:
        """Ids of a prompt without a chat template: one BOS if the tokenizer puts one first, and no EOS behind."""
        context = list(self._tokenizer(prompt)["input_ids"])
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is not None and context[:2] == [bos, bos]:
            del context[0]
        return context[:-1] if context and context[-1] == eos else context


def _joined(context: list[int], response: list[int], turn: int | None = None) -> Encoded:
    return Encoded(context + response, [False] * len(context) + [True] * len(response), turn)
