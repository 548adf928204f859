"""From a row as it stands in the file to its trajectories, or to a sentence that says what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from pear_megatron.data.behavior import looks_half, read_behavior_logprobs
from pear_megatron.data.chat import Conversation
from pear_megatron.data.config import DataConfig
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import (
    form_of,
    get_flag,
    get_integers,
    get_mask,
    get_nullable_floats,
    get_number,
    get_text,
    get_token_weights,
)
from pear_megatron.data.files import Row
from pear_megatron.data.text import TextReader, Tokenized, conversation_of
from pear_megatron.data.trajectory import Trajectory


class Validator:
    """Checks rows and makes trajectories of them (docs/method.md, Where it goes wrong).

    Args:
        config: the recipe's ``data:`` section.
        require_behavior_logprobs: False for plain SFT, where missing ones become zeros.
        vocab_size: true size of the model's vocabulary; None takes the tokenizer's, if there is one.
        tokenizer: a fast Hugging Face tokenizer; text rows need it.

    Attributes:
        counts: ``trajectories``, ``dropped_truncated``, ``dropped_overlong``, ``half_precision``, ``token_weights``
            (trajectories that have any), and of rows that are split into their turns ``split_rows``,
            ``split_trajectories``, ``split_tokens`` and ``split_whole_tokens``, what one rendering of each would be.
        tokenizer_hash: of the tokenizer and chat template, or else the one that the rows carry, or None.
        encoder: what tokenises text rows; None without a tokenizer.

    Raises:
        DataError: the chat template cannot be read.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        require_behavior_logprobs: bool,
        vocab_size: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._config = config
        self._required = require_behavior_logprobs
        self._text = TextReader(config, tokenizer)
        self._vocab_size = len(tokenizer) if vocab_size is None and tokenizer is not None else vocab_size
        self._first_use: dict[str, str] = {}
        self.tokenizer_hash = self._text.tokenizer_hash
        self.encoder = self._text.encoder
        self.counts: Counter[str] = Counter(
            trajectories=0, dropped_truncated=0, dropped_overlong=0, half_precision=0
        )

    @property
    def notes(self) -> dict[str, int]:
        """What became of text rows that the user should know, and how many times it happened."""
        return self._text.notes

    def __call__(self, row: Row) -> list[Trajectory]:
        """The row's trajectories, none if a policy drops them; RowProblem if the row is wrong."""
        fields = row.fields
        identity = self._identity(row)
        self._check_origin(fields)
        form = form_of(fields)
        if get_flag(fields, "truncated") and self._drops_truncated():
            self.counts["dropped_truncated"] += 1
            return []
        reward = get_number(fields, "reward", 1.0)
        conversation = None if form[0] == "input_ids" else conversation_of(fields, form)
        if conversation is None:
            parts = [Tokenized(get_integers(fields, "input_ids"), get_mask(fields, "loss_mask"))]
        else:
            parts = self._text.encode(conversation, form[0])
        for part in parts:
            self._check_tokens(part.input_ids, part.loss_mask)
        self._count_split(parts)
        kept = [part for part in parts if not self._is_overlong(part, form)]
        if not kept:
            return []
        behavior = self._behavior(fields, form, conversation, kept)
        weights = get_token_weights(fields, kept[0].loss_mask)
        if weights is not None and (weights[kept[0].loss_mask] == 1).all():
            weights = None
        self.counts["trajectories"] += len(kept)
        self.counts["token_weights"] += weights is not None
        found = []
        for part, logprobs in zip(kept, behavior, strict=True):
            name = identity if part.turn is None else f"{identity}#{part.turn}"
            if "id" in fields and part.turn is not None:
                self._check_unique(name, row.where)
            self.counts["half_precision"] += looks_half(logprobs[part.loss_mask])
            ids = part.input_ids.astype(np.int32)
            found.append(Trajectory(name, ids, part.loss_mask, logprobs, reward, weights))
        return found

    def _identity(self, row: Row) -> str:
        value = row.fields.get("id", row.where)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise RowProblem(f"id = {value!r} is a {type(value).__name__}; it must be a string")
        if "id" in row.fields:
            self._check_unique(str(value), row.where)
        return str(value)

    def _check_unique(self, identity: str, where: str) -> None:
        first = self._first_use.setdefault(identity, where)
        if first != where:
            raise RowProblem(f"id = {identity!r} is duplicated: {first} has it too; make ids unique")

    def _check_origin(self, fields: Mapping[str, Any]) -> None:
        temperature = get_number(fields, "temperature", 1.0)
        if self._required and temperature != 1.0:
            raise RowProblem(
                f"temperature = {temperature:g}: behavior_logprobs must be those of the policy at "
                "temperature 1, as the model's in training are; score them again with `pear-megatron score`"
            )
        if "tokenizer_hash" not in fields:
            return
        found = get_text(fields, "tokenizer_hash")
        if self.tokenizer_hash is None:
            self.tokenizer_hash = found
        if found != self.tokenizer_hash:
            raise RowProblem(
                f"tokenizer_hash = {found!r}, but {self._text.origin} has {self.tokenizer_hash!r}: a foreign "
                "tokenizer, chat_template or chat_template_kwargs made these token ids; use those (data.tokenizer, "
                "data.chat_template, data.chat_template_kwargs), or tokenise and score the data again"
            )

    def _drops_truncated(self) -> bool:
        policy = self._config.truncated
        if policy == "error":
            raise RowProblem(
                "truncated = True: the response lost its suffix, and with it its weights; drop the row, or "
                "set data.truncated=drop"
            )
        return policy == "drop"

    def _is_overlong(self, part: Tokenized, form: tuple[str, ...]) -> bool:
        n = len(part.input_ids)
        if n - 1 <= self._config.seq_length:
            return False
        if self._config.overlong == "error":
            turn = "" if part.turn is None else f", assistant turn {part.turn},"
            raise RowProblem(
                f"{form[0]}{turn} has {n} tokens, over-long for data.seq_length = {self._config.seq_length}, which "
                f"holds {self._config.seq_length + 1}; raise it, or set data.overlong=drop (a cut response would "
                "lose the suffix its weights come from)"
            )
        self.counts["dropped_overlong"] += 1
        return True

    def _count_split(self, parts: list[Tokenized]) -> None:
        if len(parts) > 1:
            self.counts["split_rows"] += 1
            self.counts["split_trajectories"] += len(parts)
            self.counts["split_tokens"] += sum(len(part.input_ids) for part in parts)
            self.counts["split_whole_tokens"] += len(parts[-1].input_ids)

    def _check_tokens(self, input_ids: np.ndarray, loss_mask: np.ndarray) -> None:
        if len(input_ids) != len(loss_mask):
            raise RowProblem(
                f"loss_mask has {len(loss_mask)} entries and input_ids {len(input_ids)}; write one per token"
            )
        vocab_size = self._vocab_size if self._vocab_size is not None else np.iinfo(np.int32).max
        outside = np.flatnonzero((input_ids < 0) | (input_ids >= vocab_size))
        if len(outside):
            i = outside[0]
            raise RowProblem(
                f"input_ids[{i}] = {input_ids[i]} is outside the vocabulary of {vocab_size} (0 to "
                f"{vocab_size - 1}); another tokenizer made it, or padding was left in"
            )
        if not loss_mask.any():
            raise RowProblem(
                f"loss_mask is all 0 over {len(loss_mask)} tokens (all masked, an empty response): there is "
                "no decision to learn from; drop the row, or mark the response with 1"
            )
        if loss_mask[0]:
            raise RowProblem(
                "loss_mask[0] = 1: token 0 has no context to be predicted from; put the prompt (or BOS) "
                "before the response and mark it 0"
            )

    def _behavior(
        self,
        fields: Mapping[str, Any],
        form: tuple[str, ...],
        conversation: Conversation | None,
        parts: list[Tokenized],
    ) -> list[np.ndarray]:
        """The behaviour log-probs of each part, float32 [n]."""
        given = [name for name in ("behavior_logprobs", "policy_logprobs") if name in fields]
        whole = parts[0]
        if given and conversation is not None and parts[0].turn is not None:
            whole = self._text.whole(conversation, parts, given[0])
        source = "input_ids" if conversation is None else f"{form[0]}, as data.tokenizer encodes it,"
        behavior = read_behavior_logprobs(fields, whole.loss_mask, source, required=self._required)
        if "policy_logprobs" in given:  # for `inspect`: training computes them itself
            count = len(get_nullable_floats(fields, "policy_logprobs")[0])
            if count != len(whole.loss_mask):
                raise RowProblem(
                    f"policy_logprobs has {count} entries and {source} {len(whole.loss_mask)}; drop the field, or "
                    "write it again with `pear-megatron score --as policy`"
                )
        if parts[0].turn is None:
            return [behavior]
        if not given:
            return [np.zeros(len(part.loss_mask), dtype=np.float32) for part in parts]
        return [np.where(part.loss_mask, behavior[: len(part.loss_mask)], np.float32(0)) for part in parts]
