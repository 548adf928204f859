"""Token ids for recorded log-probs, and whether recorded tokens are the ones they should be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NoReturn

from pear_megatron.data.chat import ChatEncoder, Conversation
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import short, vocabulary
from pear_megatron.score.recorded.request import NO_PROMPT, Request, joined_text, with_lines

RECORD_IDS = (
    "have the server record token ids: return_token_ids=true (vLLM), or return_tokens_as_token_ids=true "
    "beside logprobs"
)
_PARSED = ("content", "reasoning_content", "reasoning", "tool_calls")  # of a message, all that was generated
# In a template that gets a list of parts as it is.
_READS_PARTS = re.compile(r"for\s+\w+\s+in\s+[\w.\[\]'\"]*content")
_TODAY = (
    "prompts that may hold a date, for which the chat template got today's ({:%Y-%m-%d}), as the answer does not say "
    "when it was created"
)
_JOINED = "messages of several text parts, with a line break between them as vLLM has it (SGLang: a space)"
_OPENING = 8  # tokens that a chat template may open an answer with, such as <think>
_SPACE = "\u2581"  # how SentencePiece writes one
_SHIFTED = "the log-probs are shifted or belong to other tokens"
_TRIMMED = "a parser or a client has changed the text's white space; give it as it was sampled"
ID_PREFIX = "token_id:"  # vLLM's and SGLang's way to write an id where a token's text is expected


def id_in(token: str) -> int | None:
    """The id in ``token_id:123``; None for any other text."""
    digits = token.removeprefix(ID_PREFIX)
    return int(digits) if digits != token and digits.isdecimal() else None


class Tokens:
    """A tokenizer, or the lack of one, as recorded rows need it.

    Args:
        tokenizer: a fast Hugging Face tokenizer, or None.
        encoder: that of the loader, with its chat template; None without a tokenizer.
    """

    def __init__(self, tokenizer: Any, encoder: ChatEncoder | None) -> None:
        self._tokenizer = tokenizer
        self.encoder = encoder

    def of_context(self, request: Request, *, chat: bool) -> list[int]:
        """Ids of the context that the response was generated from.

        Args:
            chat: the answer is a chat's, so that a prompt is the user's message; otherwise it stands as it is.
        """
        tokenizer, encoder = self._needed("the prompt is text")
        if chat or request.messages is not None:
            return encoder.generation_prompt(self._conversation(request))
        if request.prompt is None:
            raise RowProblem(NO_PROMPT)
        if any(request.system.values()):
            raise RowProblem(
                "a system message beside the text prompt of a completion has no place in it; give the prompt as it was "
                "sent, system message included, and leave the column out"
            )
        return list(tokenizer(request.prompt)["input_ids"])

    def of_trajectory(self, request: Request, response: Any) -> tuple[list[int], list[bool]]:
        """(input_ids, loss_mask) of a whole conversation, as the loader would encode it."""
        _, encoder = self._needed("the trajectory is text")
        encoded = encoder.encode(replace(self._conversation(request), response=response))
        if len(encoded) > 1:
            raise RowProblem(
                f"the chat template gives the {len(encoded)} turns contexts that are not one row of tokens, and "
                "log-probs were recorded for one; give input_ids+loss_mask as they were scored, a row a turn"
            )
        return encoded[0].input_ids, encoded[0].loss_mask

    def of_text(self, text: Any, recorded: Sequence[str], *, truncated: bool) -> list[int]:
        """Ids of a completion's response as it stands, and of the token that ended it."""
        tokenizer, _ = self._needed("the response is text")
        if not isinstance(text, str):
            raise RowProblem(
                f"the response is {short(text)}; it must be text where no token ids are recorded"
            )
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if truncated:
            return ids
        if tokenizer.eos_token_id is None:
            raise RowProblem(f"the tokenizer has no EOS token, by which the response ended; {RECORD_IDS}")
        return self._as_it_ended([*ids, tokenizer.eos_token_id], recorded)

    def of_message(
        self, request: Request, message: Mapping[str, Any], recorded: Sequence[str], *, truncated: bool
    ) -> list[int]:
        """Ids of an assistant's message and of the token that ended it.

        What a server has parsed (reasoning, tool calls) no longer stands as it was sampled: then the recorded
        texts are joined, or, where they are pieces of characters, the chat template has to write it again.
        """
        _, encoder = self._needed("the response is text")
        conversation = self._conversation(request, noted=False)
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        calls, content = message.get("tool_calls") or [], message.get("content")
        if not reasoning and not calls:
            text = joined_text(content, "message")
            ids = encoder.response_ids(conversation, text, truncated=truncated)
            return ids if truncated else self._as_it_ended(ids, recorded)
        joined = "".join(recorded)
        if "\ufffd" in joined or any(token.startswith("bytes:") for token in recorded):
            parsed = {name: message[name] for name in _PARSED if message.get(name)}
            answer = {"role": "assistant", **parsed}
            try:
                ids = encoder.response_ids(conversation, answer, truncated=truncated)
            except RowProblem as problem:
                what = "tool calls" if calls else "reasoning"
                raise RowProblem(
                    f"the answer has {what}, and the chat template cannot write it again ({problem}); {RECORD_IDS}"
                ) from problem
            joined = self._text(ids)
        else:
            ids = encoder.response_ids(conversation, joined, truncated=True)
            if not truncated and (not ids or ids[-1] not in encoder.special_ids):
                raise RowProblem(
                    f"the last recorded token is {recorded[-1]!r}: the end of turn, which the policy chose as well, is "
                    f"not recorded; {RECORD_IDS}, or score with --model"
                )
        names = [("tool call", call["function"]["name"]) for call in calls]
        for what, text in [("reasoning", reasoning), ("text", content), *names]:
            if text and joined_text(text, "message").strip() not in joined:
                raise RowProblem(
                    f"the answer's {what} {short(text)} is not among its tokens (its log-probs do not cover it, or the "
                    f"chat template leaves it out); {RECORD_IDS}, or score with --model"
                )
        return ids

    def check(self, ids: Sequence[int], recorded: Sequence[str], name: str) -> None:
        """RowProblem where a recorded token is not the one whose id stands there.

        Texts are compared with the white space around them, but for the first space of a SentencePiece token, which
        decoding it alone may lose, and not where they are pieces of characters.
        """
        for i, (token_id, token) in enumerate(zip(ids, recorded, strict=True)):
            found = id_in(token)
            if found is not None or self._tokenizer is None:
                if found not in (None, token_id):
                    self._refuse(name, i, repr(token), token_id)
                continue
            text = self._text([token_id])
            if text == token or "\ufffd" in text + token or token.startswith("bytes:"):
                continue
            piece = str(self._tokenizer.convert_ids_to_tokens(token_id))
            if not piece.startswith(_SPACE) or piece.replace(_SPACE, " ") != token:
                trimmed = text.strip() == token.strip()
                self._refuse(name, i, repr(token), token_id, _TRIMMED if trimmed else _SHIFTED)

    def check_ids(self, ids: Sequence[int], recorded: Sequence[int | None], name: str) -> None:
        """RowProblem where a recorded id, if there is one, is not the one that stands there."""
        for i, (token_id, found) in enumerate(zip(ids, recorded, strict=True)):
            if found is not None and found != token_id:
                self._refuse(name, i, f"of token {found}", token_id)

    def check_said(self, context: Sequence[int], ids: Sequence[int], said: Mapping[str, Any]) -> None:
        """RowProblem where one of the texts in ``said`` is not among what recorded ids say, its words in their order.

        Servers take pieces out of a text (special tokens, stop strings, what they have parsed), put white space at
        others, and may give back what the end of the context has opened.
        """
        if self._tokenizer is None:
            return
        recorded = [*context[-_OPENING:], *ids]
        texts = [self._text(recorded, skip_special_tokens=skip) for skip in (False, True)]
        for what, text in said.items():
            if isinstance(text, str) and not any(_has_in_order(whole, text) for whole in texts):
                raise RowProblem(
                    f"the answer's {what} {short(text)} is not among its tokens, which say {short(self._text(ids))}: "
                    "they do not cover it, or are those of another answer; drop the row"
                )

    def is_end(self, token: int | str) -> bool | None:
        """Whether an id, or a token's text, is one that ends a turn or a text; None without a tokenizer."""
        if self._tokenizer is None or self.encoder is None:
            return None
        return (self._id_of(token) if isinstance(token, str) else token) in self.encoder.special_ids

    def _id_of(self, text: str) -> int | None:
        """The id of a token, by its name or as ``token_id:N``; None where it has none of its own."""
        found = id_in(text)
        if found is not None:
            return found
        found = self._tokenizer.convert_tokens_to_ids(text)
        # Texts that are no token's name get the unknown token, which may be a special one.
        return found if found is not None and self._tokenizer.convert_ids_to_tokens(found) == text else None

    def _refuse(self, name: str, i: int, found: str, token_id: int, why: str = _SHIFTED) -> NoReturn:
        raise RowProblem(
            f"{name}[{i}] is {found}, but the token there is {self._shown(token_id)}: {why}; {RECORD_IDS}, or score "
            "with --model"
        )

    def _shown(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"id {token_id}"
        return f"id {token_id} ({self._text([token_id])!r})"

    def _text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """What ids say; RowProblem where one is no token id."""
        try:
            text = self._tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
            return str(text)
        except OverflowError:  # the tokenizer counts in 32 bits
            wrong = next(i for i in ids if not 0 <= i < 2**32)
            raise RowProblem(
                f"token id {wrong} is {vocabulary(len(self._tokenizer))}; the row is damaged, drop it"
            ) from None

    def _conversation(self, request: Request, *, noted: bool = True) -> Conversation:
        """The request as vLLM renders it: with reasoning_effort, of the answer's day, a line for each text part."""
        _, encoder = self._needed("the prompt is text")
        given = request.conversation
        text = encoder.template_text(given) or ""
        kwargs = dict(given.chat_template_kwargs or {})
        if request.effort is not None and "reasoning_effort" in text:
            kwargs.setdefault("reasoning_effort", request.effort)
        if "strftime_now" in text and "strftime_now" not in kwargs:
            kwargs["strftime_now"] = (request.created or datetime.now()).isoformat()
            if request.created is None and noted:
                encoder.notes[_TODAY.format(datetime.now())] += 1
        if text and not _READS_PARTS.search(text):
            messages, joined = with_lines(given.messages)
            given = replace(given, messages=messages)
            if joined and noted:
                encoder.notes[_JOINED] += joined
        return replace(given, chat_template_kwargs=kwargs or None)

    def _as_it_ended(self, ids: list[int], recorded: Sequence[str]) -> list[int]:
        """A policy may stop at another special token than the chat template's; the recorded one is right."""
        _, encoder = self._needed("the response is text")
        last = self._id_of(recorded[-1]) if recorded else None
        if last is None or last not in encoder.special_ids or ids[-1] not in encoder.special_ids:
            return ids
        return [*ids[:-1], last]

    def _needed(self, why: str) -> tuple[Any, ChatEncoder]:
        if self._tokenizer is None or self.encoder is None:
            raise RowProblem(
                f"{why} without token ids: name the tokenizer (--tokenizer or --model), or {RECORD_IDS}"
            )
        return self._tokenizer, self.encoder


def _has_in_order(whole: str, text: str) -> bool:
    """Whether the words of ``text``, but for those with pieces of characters, are in ``whole`` in this order."""
    whole, place = "".join(whole.split()), 0
    for word in text.split():
        if "\ufffd" in word:
            continue
        found = whole.find(word, place)
        if found < 0:
            return False
        place = found + len(word)
    return True
