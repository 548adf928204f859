"""Turning messages, or a prompt and a response, into token ids with the decisions marked."""

from __future__ import annotations

import re
from typing import Any

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import short

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
_GIVE_IDS = "or give input_ids+loss_mask as they were sampled"

Tokens = tuple[list[int], list[bool]]


class ChatEncoder:
    """Tokenises text rows with a Hugging Face tokenizer and its chat template.

    Decisions are the tokens the behaviour policy chose (docs/method.md, Words): the content of every assistant
    turn and the token that ends the turn, not the white space that the template puts after it.

    Args:
        tokenizer: a fast Hugging Face tokenizer.

    Attributes:
        special_ids: ids of its special tokens, such as those that end a turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template: str | None = tokenizer.get_chat_template() if tokenizer.chat_template else None
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = set(tokenizer.all_special_ids) | {i for i, token in added if token.special}

    def encode_messages(self, messages: Any) -> Tokens:
        """(input_ids, loss_mask) of a conversation; RowProblem where that is not possible.

        Uses the template's generation marks where it has them; otherwise finds each assistant turn as the
        difference between two prefixes of the conversation, which must be prefixes as token ids as well.
        """
        turns = _check_messages(messages)
        if self._template is None:
            raise RowProblem(f"messages: the tokenizer has no chat template; take one that has, {_GIVE_IDS}")
        if _GENERATION_MARK.search(self._template):
            encoded = self._apply(turns, return_assistant_tokens_mask=True)
            return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]
        return self._encode_by_prefixes(turns)

    def encode_prompt_response(self, prompt: str, response: str) -> Tokens:
        """(input_ids, loss_mask) of one user turn and one assistant turn.

        Without a chat template: the prompt as the tokenizer encodes it (with its BOS, if it has one), then
        the response, then EOS; the response and EOS are decisions.
        """
        if not response:
            raise RowProblem("response = '' is empty: there is no decision to learn from; drop the row")
        if self._template is not None:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return self.encode_messages(turns)
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise RowProblem(f"response: the tokenizer has no EOS token to end it; set one, {_GIVE_IDS}")
        context = list(self._tokenizer(prompt)["input_ids"])
        if context and context[-1] == eos:
            context.pop()
        decisions = [*self._tokenizer(response, add_special_tokens=False)["input_ids"], eos]
        return context + decisions, [False] * len(context) + [True] * len(decisions)

    def _encode_by_prefixes(self, turns: list[dict[str, Any]]) -> Tokens:
        input_ids = self._ids(turns)
        mask = [False] * len(input_ids)
        for k, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            context = self._ids(turns[:k], add_generation_prompt=True)
            through = self._ids(turns[: k + 1])
            if through[: len(context)] != context or input_ids[: len(through)] != through:
                raise RowProblem(
                    f"messages[{k}]: the assistant turn has no sure place among the tokens, because the chat "
                    "template renders the turns before it differently once it is there; use a template with "
                    f"{{% generation %}} marks, {_GIVE_IDS}"
                )
            end = self._end_of_turn(through, len(context))
            mask[len(context) : end] = [True] * (end - len(context))
        return input_ids, mask

    def _end_of_turn(self, input_ids: list[int], start: int) -> int:
        # "<|im_end|>\n": the policy stopped at the special token; the newline is the template's.
        end = len(input_ids)
        while end > start and not self._tokenizer.decode([input_ids[end - 1]]).strip():
            end -= 1
        return end if end > start and input_ids[end - 1] in self.special_ids else len(input_ids)

    def _ids(self, turns: list[dict[str, Any]], **options: Any) -> list[int]:
        return list(self._apply(turns, **options)["input_ids"])

    def _apply(self, turns: list[dict[str, Any]], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise RowProblem(f"messages: the chat template refuses them: {error}; change the row") from error


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RowProblem(f"messages = {short(messages)}; it must be a list of {{role, content}}, not empty")
    turns = []
    for k, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowProblem(f"messages[{k}] = {short(message)}; it must be an object with a role")
        # A Parquet struct has every key in every message, null where the row had none.
        turns.append({key: v for key, v in message.items() if v is not None or key == "content"})
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        roles = ", ".join(turn["role"] for turn in turns)
        raise RowProblem(f"messages has no assistant turn (roles: {roles}): no decision; drop the row")
    if turns[0]["role"] == "assistant":
        raise RowProblem("messages[0] is an assistant turn without a prompt; begin with system or user")
    if not any(turn.get("content") or turn.get("tool_calls") for turn in answers):
        raise RowProblem("messages: every assistant turn is an empty response; drop the row")
    return turns
