"""ScoreSettings and Source: what one command was asked to do, and the rows it reads."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pear_megatron.data.errors import Problems, RowProblem
from pear_megatron.data.files import expand_files, read_rows
from pear_megatron.data.options import TEXT_OPTIONS, in_options
from pear_megatron.data.tokenizer import load_tokenizer
from pear_megatron.megatron.checkpoint.model_folder import read_model_facts
from pear_megatron.progress import reading_progress
from pear_megatron.score.manifest import FORMAT_VERSION, digest_inputs
from pear_megatron.score.rows import Purpose, RowReader, ScoreRow

_OPTIONS = {**TEXT_OPTIONS, "data.train": "--data"}
NOTE = "note: "  # before what a count says in words


@dataclass(frozen=True)
class ScoreSettings:
    """What one `score` command was asked to do.

    Attributes:
        data: JSONL and Parquet files, globs allowed.
        output: the Parquet file to write.
        backend: ``megatron``, ``hf`` or ``import``.
        model: folder of the model; may be None with ``import``.
        write_as: which column the model's log-probs become.
        top_k: so many of the model's likeliest tokens are written for each decision, with ``import`` of those that
            were recorded; 0 = none.
        tokenizer: name or folder; None = the model's.
        chat_template, chat_template_kwargs, multi_turn: of text rows, see ``DataConfig``.
        max_length: positions, at most; None = the model's.
        tensor_parallel, pipeline_parallel, dtype, max_tokens_per_batch: see ``load_scorer``.
        raw_logprobs: with ``import``: the engine logged the model's own log-probs, whatever it sampled with.
        chunk_rows, chunk_tokens: what is scored between two saves; the scores may depend on it by rounding.
    """

    data: list[str]
    output: Path
    backend: str
    model: str | None = None
    write_as: Literal["behavior", "policy", "reference"] = "behavior"
    top_k: int = 0
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    multi_turn: Literal["auto", "whole", "split"] = "auto"
    max_length: int | None = None
    overlong: Literal["error", "drop"] = "error"
    overwrite: bool = False
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    dtype: str = "fp32"
    max_tokens_per_batch: int | None = None
    raw_logprobs: bool = False
    chunk_rows: int = 128
    chunk_tokens: int = 131072

    @property
    def text(self) -> dict[str, Any]:
        """What a data section says about text rows."""
        return {
            "chat_template": self.chat_template,
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "multi_turn": self.multi_turn,
        }

    @property
    def purpose(self) -> Purpose:
        """What rows are read for."""
        return "import" if self.backend == "import" else self.write_as


class Source:
    """The input of a job.

    Attributes:
        identity: what decides the numbers that are written (see manifest).
        weights: digest of the model's; None without one.
    """

    def __init__(self, settings: ScoreSettings) -> None:
        self._settings = settings
        facts = read_model_facts(settings.model) if settings.model else None
        self._model_name = settings.model and Path(settings.model).resolve().name
        self.weights = facts.digest if facts else None
        self._vocab_size = facts.vocab_size if facts else None
        self._max_length = settings.max_length or (facts.max_length if facts else None)
        self._tokenizer = _tokenizer(settings.tokenizer or (facts.tokenizer if facts else None))
        problems = Problems()
        self._files = expand_files(settings.data, problems)
        _raise_if_any(problems)
        self.identity = {
            "format_version": FORMAT_VERSION,
            "backend": settings.backend,
            "as": settings.write_as,
            "model": {"name": self._model_name, "digest": self.weights} if facts else None,
            "dtype": None if settings.backend == "import" else settings.dtype,
            "tokenizer_hash": self._reader(Counter()).tokenizer_hash,
            "multi_turn": settings.multi_turn,
            "max_length": self._max_length,
            "overlong": settings.overlong,
            "chunks": [settings.chunk_rows, settings.chunk_tokens],
            "raw_logprobs": settings.raw_logprobs,
            "top_k": settings.top_k or None,  # as files have it that were written before there was one
            "inputs": digest_inputs(self._files),
        }

    def rows(self, counts: Counter[str]) -> Iterator[ScoreRow]:
        """The rows to write; counts them; raises one DataError at the end if any is wrong."""
        problems = Problems()
        reader = self._reader(counts)
        with reading_progress(self._files, sys.stderr.isatty()) as advance:
            for file in self._files:
                for row in read_rows(file, problems, strict=False):
                    try:
                        found = reader(row)
                    except RowProblem as problem:
                        problems.add(row.where, problem)
                    else:
                        yield from found if not problems.total else ()
                    advance(row.size)
        if not problems.total and not counts["rows"]:
            problems.add("--data", "no row is left: all are over-long and were dropped (--overlong drop)")
        _raise_if_any(problems)
        counts.update(reader.split)
        counts.update({NOTE + note: count for note, count in reader.notes.items()})

    def _reader(self, counts: Counter[str]) -> RowReader:
        settings = self._settings
        with in_options(_OPTIONS):
            return RowReader(
                settings.purpose,
                counts,
                tokenizer=self._tokenizer,
                text=settings.text,
                vocab_size=self._vocab_size,
                max_length=self._max_length,
                overlong=settings.overlong,
                origin={"model": self._model_name, "backend": settings.backend},
                raw_logprobs=settings.raw_logprobs,
                top_k=settings.top_k,
            )


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    with in_options(_OPTIONS):
        return load_tokenizer(name)


def _raise_if_any(problems: Problems) -> None:
    with in_options(_OPTIONS):
        problems.raise_if_any()
