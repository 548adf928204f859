"""From a row of the input to the row that is written, but for the log-probs that a model still has to give."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pear_megatron.data.chat import ChatEncoder
from pear_megatron.data.config import DataConfig
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import check_names, form_of, get_flag, get_number
from pear_megatron.data.files import Row
from pear_megatron.data.tokenizer import tokenizer_hash
from pear_megatron.data.trajectory import Trajectory
from pear_megatron.data.validate import Validator
from pear_megatron.score.recorded import ordinary_fields
from pear_megatron.score.recorded.request import Request
from pear_megatron.score.recorded.tokens import Tokens

Purpose = Literal["behavior", "policy", "import"]
_TEXT_FIELDS = ("messages", "prompt", "response")
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, eq=False)
class ScoreRow:
    """A row of the output; ``behavior_logprobs`` of its trajectory are 0 where a model gives them yet.

    Attributes:
        tokenizer_hash: of the tokenizer that scores, or else the one the row came with.
        truncated: the row's own mark; None = it had none.
        metadata: JSON: the source's file and line, the text fields, the row's own metadata.
    """

    trajectory: Trajectory
    tokenizer_hash: str | None
    truncated: bool | None
    metadata: str


class RowReader:
    """Checks rows, tokenises text with the loader's own encoder, and reads recorded log-probs.

    Args:
        purpose: ``behavior`` takes a row's log-probs and temperature away, a model gives new ones;
            ``policy`` keeps and checks them; ``import`` takes what the generator recorded.
        counts: gets ``rows``, ``overlong`` (dropped), ``truncated``, ``replaced`` (had log-probs of their own).
        tokenizer: a fast Hugging Face tokenizer; text rows need it.
        vocab_size: of the model; None = the tokenizer's.
        max_length: positions; a trajectory of n tokens takes n - 1. None = no limit.
        overlong: what to do with a longer one.
        notes: goes into every row's metadata.
        raw_logprobs: see ``ordinary_fields``.
    """

    def __init__(
        self,
        purpose: Purpose,
        counts: Counter[str],
        *,
        tokenizer: Any = None,
        vocab_size: int | None = None,
        max_length: int | None = None,
        overlong: Literal["error", "drop"] = "error",
        notes: Mapping[str, Any] | None = None,
        raw_logprobs: bool = False,
    ) -> None:
        config = DataConfig(
            train=["-"],
            seq_length=_NO_LIMIT,
            truncated="keep",
            tokenizer=getattr(tokenizer, "name_or_path", None),
        )
        self._purpose = purpose
        self._validator = Validator(
            config,
            require_behavior_logprobs=purpose != "behavior",
            vocab_size=vocab_size,
            tokenizer=tokenizer,
        )
        self._tokens = Tokens(tokenizer)
        self._encoder: ChatEncoder | None = self._tokens.encoder
        self._hash = tokenizer_hash(tokenizer) if tokenizer is not None else None
        self._limit = _NO_LIMIT if max_length is None else max_length
        self._overlong = overlong
        self._notes = dict(notes or {})
        self._counts = counts
        self._raw_logprobs = raw_logprobs

    def __call__(self, row: Row) -> list[ScoreRow]:
        """The row's ScoreRows, none if it is dropped; RowProblem if it is wrong."""
        texts = {name: row.fields[name] for name in _TEXT_FIELDS if name in row.fields}
        if self._purpose != "import":
            check_names(row.fields)
            return self._score_rows(row, texts)
        found = ordinary_fields(row.fields, self._tokens, raw_logprobs=self._raw_logprobs)
        scored = []
        for k, (fields, notes) in enumerate(found):
            where = f"{row.where}#{k}" if len(found) > 1 else row.where
            own = {"metadata": row.fields["metadata"]} if "metadata" in row.fields else {}
            scored += self._score_rows(replace(row, where=where, fields=fields | own), notes)
        return scored

    def _score_rows(self, row: Row, texts: Mapping[str, Any]) -> list[ScoreRow]:
        fields = dict(row.fields)
        own = fields.get("metadata")
        fields.pop("metadata", None)
        fields.pop("policy_logprobs", None)
        kept: dict[str, Any] = {}
        if self._purpose == "behavior":
            kept = self._take_origin_away(fields)
        truncated = get_flag(fields, "truncated") if "truncated" in fields else None
        if truncated:
            fields = self._without_end_of_turn(fields)
        trajectory = self._validator(replace(row, fields=fields))
        assert trajectory is not None  # nothing is dropped for its length or its truncation here
        if self._is_overlong(trajectory):
            return []
        self._counts["rows"] += 1
        self._counts["truncated"] += bool(truncated)
        notes = {"source": row.where, **self._notes, **texts, **kept}
        if own is not None:
            notes["metadata"] = _parsed(own)
        return [
            ScoreRow(
                trajectory,
                self._hash or fields.get("tokenizer_hash"),
                truncated,
                json.dumps(notes, ensure_ascii=False, default=str),
            )
        ]

    def _take_origin_away(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Removes what describes the log-probs that are replaced; returns what to remember of it."""
        self._counts["replaced"] += fields.pop("behavior_logprobs", None) is not None
        temperature = get_number(fields, "temperature", 1.0)
        fields.pop("temperature", None)
        return {} if temperature == 1 else {"temperature": temperature}

    def _without_end_of_turn(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A truncated row as ids that stop where the policy did, not at an end of turn it never produced."""
        fields = {name: value for name, value in fields.items() if name != "truncated"}
        form = form_of(fields)
        if form[0] == "input_ids":
            return fields
        if self._purpose == "policy" or self._encoder is None:
            raise RowProblem(
                f"truncated = True: a row of {form[0]} would get an end of turn that the policy never produced; "
                "give input_ids+loss_mask, or drop the row"
            )
        ids, mask = self._tokens.of_trajectory(Request.of(fields), fields.get("response"))
        end = int(np.flatnonzero([False, *mask])[-1]) if any(mask) else len(mask)
        if ids[end - 1] in self._encoder.special_ids:
            end -= 1
        others = {name: value for name, value in fields.items() if name not in form}
        return others | {"input_ids": ids[:end], "loss_mask": mask[:end]}

    def _is_overlong(self, trajectory: Trajectory) -> bool:
        n = len(trajectory.input_ids)
        if n - 1 <= self._limit:
            return False
        if self._overlong == "error":
            raise RowProblem(
                f"{n} tokens, over-long: --max-length (default: the model's max_position_embeddings) is "
                f"{self._limit} and holds {self._limit + 1}; drop such rows with --overlong drop, or raise "
                "--max-length if the model can take more"
            )
        self._counts["overlong"] += 1
        return True


def _parsed(metadata: Any) -> Any:
    """Metadata that is JSON as text (as this package writes it), as what it says."""
    if isinstance(metadata, str):
        try:
            return json.loads(metadata)
        except ValueError:
            pass
    return metadata
