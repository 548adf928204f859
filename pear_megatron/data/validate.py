"""From a row as it stands in the file to a Trajectory, or to a sentence that says what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from pear_megatron.data.behavior import looks_half, read_behavior_logprobs
from pear_megatron.data.chat import ChatEncoder
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
)
from pear_megatron.data.files import Row
from pear_megatron.data.tokenizer import tokenizer_hash
from pear_megatron.data.trajectory import Trajectory


class Validator:
    """Checks rows and makes trajectories of them (docs/method.md, Where it goes wrong).

    Args:
        config: the recipe's ``data:`` section.
        require_behavior_logprobs: False for plain SFT, where missing ones become zeros.
        vocab_size: true size of the model's vocabulary; None takes the tokenizer's, if there is one.
        tokenizer: a fast Hugging Face tokenizer; text rows need it.

    Attributes:
        counts: ``trajectories``, ``dropped_truncated``, ``dropped_overlong``, ``half_precision``.
        tokenizer_hash: of the tokenizer, or else the one that the rows carry, or None.
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
        self._encoder = ChatEncoder(tokenizer) if tokenizer is not None else None
        self._vocab_size = len(tokenizer) if vocab_size is None and tokenizer is not None else vocab_size
        self._first_use: dict[str, str] = {}
        self.tokenizer_hash = tokenizer_hash(tokenizer) if tokenizer is not None else None
        self.counts: Counter[str] = Counter(
            trajectories=0, dropped_truncated=0, dropped_overlong=0, half_precision=0
        )

    def __call__(self, row: Row) -> Trajectory | None:
        """The row's trajectory, None if a policy drops it; RowProblem if it is wrong."""
        fields = row.fields
        identity = self._identity(row)
        self._check_origin(fields)
        form = form_of(fields)
        if get_flag(fields, "truncated") and self._drops_truncated(form):
            self.counts["dropped_truncated"] += 1
            return None
        reward = get_number(fields, "reward", 1.0)
        input_ids, loss_mask = self._tokens(fields, form)
        self._check_tokens(input_ids, loss_mask)
        if len(input_ids) - 1 > self._config.seq_length:
            if self._config.overlong == "error":
                raise RowProblem(
                    f"{form[0]} has {len(input_ids)} tokens, over-long for data.seq_length = "
                    f"{self._config.seq_length}, which holds {self._config.seq_length + 1}; raise it, or set "
                    "data.overlong=drop (a cut response would lose the suffix its weights come from)"
                )
            self.counts["dropped_overlong"] += 1
            return None
        behavior = self._behavior(fields, form, loss_mask)
        self.counts["trajectories"] += 1
        return Trajectory(identity, input_ids.astype(np.int32), loss_mask, behavior, reward)

    def _identity(self, row: Row) -> str:
        value = row.fields.get("id", row.where)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise RowProblem(f"id = {value!r} is a {type(value).__name__}; it must be a string")
        if "id" in row.fields:
            first = self._first_use.setdefault(str(value), row.where)
            if first != row.where:
                raise RowProblem(f"id = {value!r} is duplicated: {first} has it too; make ids unique")
        return str(value)

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
            ours = f"data.tokenizer = {self._config.tokenizer!r}" if self._encoder else "an earlier row"
            raise RowProblem(
                f"tokenizer_hash = {found!r}, but {ours} has {self.tokenizer_hash!r}: a foreign tokenizer or "
                "chat template made these token ids; use that one, or tokenise and score the data again"
            )

    def _drops_truncated(self, form: tuple[str, ...]) -> bool:
        policy = self._config.truncated
        if policy == "error":
            raise RowProblem(
                "truncated = True: the response lost its suffix, and with it its weights; drop the row, or "
                "set data.truncated=drop"
            )
        if policy == "keep" and form[0] != "input_ids":
            raise RowProblem(
                f"truncated = True: with data.truncated=keep a row of {form[0]} would get an end of turn "
                "that the policy never produced; give input_ids+loss_mask, or set data.truncated=drop"
            )
        return policy == "drop"

    def _tokens(self, fields: Mapping[str, Any], form: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        if form[0] == "input_ids":
            return get_integers(fields, "input_ids"), get_mask(fields, "loss_mask")
        if self._encoder is None:
            raise RowProblem(
                f"{form[0]} is text and data.tokenizer is not set; set it to the model's Hugging Face name "
                "or folder, or give input_ids+loss_mask"
            )
        if form[0] == "messages":
            input_ids, loss_mask = self._encoder.encode_messages(fields["messages"])
        else:
            prompt, response = get_text(fields, "prompt"), get_text(fields, "response")
            input_ids, loss_mask = self._encoder.encode_prompt_response(prompt, response)
        return np.array(input_ids, dtype=np.int64), np.array(loss_mask, dtype=bool)

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

    def _behavior(self, fields: Mapping[str, Any], form: tuple[str, ...], mask: np.ndarray) -> np.ndarray:
        source = "input_ids" if form[0] == "input_ids" else f"{form[0]}, as data.tokenizer encodes it,"
        behavior = read_behavior_logprobs(fields, mask, source, required=self._required)
        if "policy_logprobs" in fields:  # for `inspect`: training computes them itself
            count = len(get_nullable_floats(fields, "policy_logprobs")[0])
            if count != len(mask):
                raise RowProblem(
                    f"policy_logprobs has {count} entries and {source} {len(mask)}; drop the field, or write "
                    "it again with `pear-megatron score --as policy`"
                )
        self.counts["half_precision"] += looks_half(behavior[mask])
        return behavior
