"""Token ids for recorded log-probs, and whether recorded tokens are the ones they should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pear_megatron.data.chat import ChatEncoder, Conversation
from pear_megatron.data.errors import RowProblem

RECORD_IDS = (
    "have the server record token ids: return_token_ids=true (vLLM), or return_tokens_as_token_ids=true "
    "beside logprobs"
)
_ID_PREFIX = "token_id:"  # vLLM's and SGLang's way to write an id where a token's text is expected


def id_in(token: str) -> int | None:
    """The id in ``token_id:123``; None for any other text."""
    digits = token.removeprefix(_ID_PREFIX)
    return int(digits) if digits != token and digits.isdecimal() else None


class Tokens:
    """A tokenizer, or the lack of one, as recorded rows need it.

    Args:
        tokenizer: a fast Hugging Face tokenizer, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.encoder = ChatEncoder(tokenizer, multi_turn="whole") if tokenizer is not None else None

    def _needed(self, why: str) -> Any:
        if self._tokenizer is None:
            raise RowProblem(
                f"{why} without token ids: name the tokenizer (--tokenizer or --model), or {RECORD_IDS}"
            )
        return self._tokenizer

    def of_prompt(self, messages: Any, prompt: Any) -> list[int]:
        """Ids of the context that the response was generated from."""
        if isinstance(prompt, list) and prompt and all(isinstance(i, int) for i in prompt):
            return prompt
        tokenizer = self._needed("the prompt is text")
        if messages is not None:
            from jinja2 import TemplateError

            try:
                encoded = tokenizer.apply_chat_template(
                    messages, tokenize=True, add_generation_prompt=True, return_dict=True
                )
            except (TemplateError, TypeError, ValueError) as error:
                raise RowProblem(f"messages: the chat template refuses them: {error}") from error
            return list(encoded["input_ids"])
        if not isinstance(prompt, str):
            raise RowProblem(
                f"no prompt: give messages, prompt or prompt_token_ids beside the response, or {RECORD_IDS}"
            )
        return list(tokenizer(prompt)["input_ids"])

    def of_trajectory(self, messages: Any, prompt: Any, response: Any) -> tuple[list[int], list[bool]]:
        """(input_ids, loss_mask) of a whole conversation, as the loader would encode it."""
        self._needed("the trajectory is text")
        assert self.encoder is not None
        if messages is not None:
            conversation = Conversation(messages=messages)
        elif isinstance(prompt, str) and isinstance(response, str):
            conversation = Conversation(prompt=prompt, response=response)
        else:
            raise RowProblem("prompt and response must be strings, unless the server recorded token ids")
        (encoded,) = self.encoder.encode(conversation)
        return encoded.input_ids, encoded.loss_mask

    def of_response(
        self, messages: Any, prompt: Any, response: str, *, truncated: bool
    ) -> tuple[list[int], list[int]]:
        """(ids of the context, ids of the response with its end of turn unless truncated) of a text."""
        whole = [*messages, {"role": "assistant", "content": response}] if messages is not None else None
        ids, mask = self.of_trajectory(whole, prompt, response)
        end = start = len(mask) - mask[::-1].index(True)
        while start > 0 and mask[start - 1]:
            start -= 1
        assert self.encoder is not None
        if truncated and ids[end - 1] in self.encoder.special_ids:
            end -= 1
        return ids[:start], ids[start:end]

    def check(self, ids: Sequence[int], recorded: Sequence[str], name: str) -> None:
        """RowProblem where a recorded token is not the one whose id stands there.

        Texts are compared without the white space around them, which decoding one token may lose, and not
        where they are pieces of characters.
        """
        for i, (token_id, token) in enumerate(zip(ids, recorded, strict=True)):
            found = id_in(token)
            if found is None and self._tokenizer is not None:
                text = self._tokenizer.decode([token_id])
                pieces = "\ufffd" in text + token or token.startswith("bytes:")
                same = pieces or text.strip() == token.strip()
            else:
                same = found is None or found == token_id
            if not same:
                raise RowProblem(
                    f"{name}[{i}] is {token!r}, but the token there is {self._shown(token_id)}: the log-probs are "
                    f"shifted or belong to other tokens; {RECORD_IDS}, or score with --model"
                )

    def _shown(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"id {token_id}"
        return f"id {token_id} ({self._tokenizer.decode([token_id])!r})"
