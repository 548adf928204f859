"""From a row of the input to the rows that are written, but for the log-probs that a model still has to give."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pear_megatron.data.columns import ALL_COLUMNS, REFERENCE, TOPK_IDS, TOPK_LOGPROBS
from pear_megatron.data.config import DataConfig
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import FUNCTIONS, OF_TEXT, SYSTEM, get_flag, get_number, parsed
from pear_megatron.data.files import Row
from pear_megatron.data.trajectory import Trajectory
from pear_megatron.data.validate import IDS_WITHOUT_END, Validator
from pear_megatron.score.recorded import NO_END, ordinary_fields
from pear_megatron.score.recorded.beside import Remarks
from pear_megatron.score.recorded.tokens import Tokens

Purpose = Literal["behavior", "policy", "reference", "import"]
_TEXT_FIELDS = ("messages", "conversations", "prompt", "response", *OF_TEXT, *SYSTEM, FUNCTIONS)
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, eq=False)
class ScoreRow:
    """A row of the output.

    Attributes:
        scored: whether its trajectory has behavior_logprobs; otherwise they are 0.
        tokenizer_hash: of the tokenizer that scores, or else the one the row came with.
        truncated: the row's own mark; None = it had none.
        metadata: JSON: the source's file and line, the text fields, the row's own metadata.
    """

    trajectory: Trajectory
    scored: bool
    tokenizer_hash: str | None
    truncated: bool | None
    metadata: str


class RowReader:
    """Checks rows, tokenises text with the loader's own encoder, and reads recorded log-probs.

    Args:
        purpose: ``behavior`` takes a row's log-probs and temperature away, a model gives new ones;
            ``policy`` keeps and checks them, and so does ``reference``, which does without as well; ``import`` takes
            what the generator recorded.
        counts: gets ``rows`` (of the output), ``overlong`` (dropped), ``truncated``, ``replaced`` (had log-probs of
            their own).
        tokenizer: a fast Hugging Face tokenizer; text rows need it.
        text: of ``DataConfig``: chat_template, chat_template_kwargs, multi_turn.
        vocab_size: of the model; None = the tokenizer's.
        max_length: positions; a trajectory of n tokens takes n - 1. None = no limit.
        overlong: what to do with a longer one.
        origin: goes into every row's metadata.
        raw_logprobs, top_k: see ``ordinary_fields``.

    Attributes:
        tokenizer_hash: of tokenizer, chat template and its arguments; None without a tokenizer.
    """

    def __init__(
        self,
        purpose: Purpose,
        counts: Counter[str],
        *,
        tokenizer: Any = None,
        text: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        max_length: int | None = None,
        overlong: Literal["error", "drop"] = "error",
        origin: Mapping[str, Any] | None = None,
        raw_logprobs: bool = False,
        top_k: int = 0,
    ) -> None:
        config = DataConfig(
            train=["-"],
            seq_length=_NO_LIMIT,
            truncated="keep",
            tokenizer=getattr(tokenizer, "name_or_path", None),
            **(text or {}),
        )
        self._purpose = purpose
        self._validator = Validator(
            config,
            require_behavior_logprobs=None if purpose == "reference" else purpose != "behavior",
            columns=ALL_COLUMNS,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
        )
        self._tokens = Tokens(tokenizer, self._validator.encoder)
        self.tokenizer_hash = self._validator.tokenizer_hash
        self._limit = _NO_LIMIT if max_length is None else max_length
        self._overlong = overlong
        self._origin = dict(origin or {})
        self._counts = counts
        self._remarks = Remarks()
        self._raw_logprobs, self._top_k = raw_logprobs, top_k

    @property
    def split(self) -> Mapping[str, int]:
        """What was split into turns, as the validator counts it."""
        return {name: count for name, count in self._validator.counts.items() if name.startswith("split_")}

    @property
    def notes(self) -> Mapping[str, int]:
        """What became of rows that the user should know, and how many times it happened."""
        of_ids, of_answers = Counter(self._validator.notes), self._remarks.notes
        of_ids.subtract({IDS_WITHOUT_END: of_answers.get(NO_END, 0)})  # the same responses, said once
        return {**+of_ids, **of_answers}

    def __call__(self, row: Row) -> list[ScoreRow]:
        """The row's ScoreRows, one per trajectory, none if they are dropped; RowProblem if the row is wrong."""
        if self._purpose != "import":
            return list(
                self._rows(row, {name: row.fields[name] for name in _TEXT_FIELDS if name in row.fields})
            )
        found = ordinary_fields(
            row.fields,
            self._tokens,
            remarks=self._remarks,
            raw_logprobs=self._raw_logprobs,
            top_k=self._top_k,
        )
        own = {"metadata": row.fields["metadata"]} if "metadata" in row.fields else {}
        written: list[ScoreRow] = []
        for k, (fields, notes) in enumerate(found):
            where = f"{row.where}#{k}" if len(found) > 1 else row.where
            written += self._rows(replace(row, where=where, fields=fields | own), notes)
        return written

    def _rows(self, row: Row, texts: Mapping[str, Any]) -> Iterator[ScoreRow]:
        fields = dict(row.fields)
        own = fields.pop("metadata", None)
        fields.pop("policy_logprobs", None)
        if self._purpose == "reference" and REFERENCE in fields:
            raise RowProblem(
                f"{REFERENCE} is there already, and --as reference would replace it; take the column out if that is "
                "what you want, or keep this file as it is"
            )
        kept: dict[str, Any] = {}
        if self._purpose == "behavior" or "behavior_logprobs" not in fields:
            kept = self._take_origin_away(fields)
        truncated = get_flag(fields, "truncated") if "truncated" in fields else None
        notes = {"source": row.where, **self._origin, **texts, **kept}
        if own is not None:
            notes["metadata"] = parsed(own)
        for trajectory in self._validator(replace(row, fields=fields)):
            if self._is_overlong(trajectory):
                continue
            self._counts["rows"] += 1
            self._counts["truncated"] += bool(truncated)
            yield ScoreRow(
                trajectory,
                "behavior_logprobs" in fields,
                self.tokenizer_hash or fields.get("tokenizer_hash"),
                truncated,
                _as_text(notes),
            )

    def _take_origin_away(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Removes what describes the log-probs that are replaced; returns what to remember of it."""
        self._counts["replaced"] += fields.pop("behavior_logprobs", None) is not None
        if self._purpose == "behavior":
            for name in (TOPK_IDS, TOPK_LOGPROBS):
                fields.pop(name, None)
        temperature = get_number(fields, "temperature", 1.0)
        fields.pop("temperature", None)
        return {} if temperature == 1 else {"temperature": temperature}

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


def _as_text(notes: Mapping[str, Any]) -> str:
    """JSON; half a character (a lone surrogate), which UTF-8 cannot hold, stays the escape that it was."""
    return json.dumps(notes, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
