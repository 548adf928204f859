"""The work folder OUT.parts: chunks of rows to score, parts that are scored, and how parts become the output.

identity.json               what is being written (see manifest)
chunks/chunk-000000.parquet rows without log-probs; the folder appears whole, with index.json
part-000000.parquet         the same rows with log-probs; each appears whole
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_megatron.data.columns import REFERENCE, TOPK_IDS, TOPK_LOGPROBS
from pear_megatron.data.topk import TopK
from pear_megatron.data.trajectory import Trajectory
from pear_megatron.errors import ScoreError
from pear_megatron.score.manifest import Identity
from pear_megatron.score.rows import ScoreRow
from pear_megatron.storage import appearing, remove, sync, write_atomically

METADATA_KEY = b"pear_megatron.score"  # of the output's Parquet schema: identity and counts, as JSON
_FLOATS = pa.list_(pa.float32())


@dataclass(frozen=True)
class Chunk:
    """Sizes of a chunk."""

    rows: int
    tokens: int
    decisions: int


class WorkFolder:
    """OUT.parts, beside the output so that both are on one file system.

    Args:
        output: the Parquet file that is being written.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".parts")
        self._chunks = self.path / "chunks"

    def read_identity(self) -> dict[str, Any] | None:
        """What the folder is for; None if there is none."""
        path = self.path / "identity.json"
        return _read_json(path) if path.is_file() else None

    def start(self, identity: Identity) -> None:
        """Makes an empty folder for a new output."""
        remove(self.path)
        try:
            self.path.mkdir(parents=True)
            write_atomically(self.path / "identity.json", json.dumps(identity, indent=1))
        except OSError as error:
            raise ScoreError(f"{self.path} cannot be written to: {error}; choose another --output") from error

    def remove(self) -> None:
        """Deletes the folder."""
        remove(self.path)

    def has_chunks(self) -> bool:
        """Whether all chunks are there."""
        return (self._chunks / "index.json").is_file()

    def read_index(self) -> tuple[list[Chunk], dict[str, int]]:
        """(the chunks, the counts of rows)."""
        index = _read_json(self._chunks / "index.json")
        return [Chunk(*sizes) for sizes in index["chunks"]], index["counts"]

    def write_chunks(
        self, rows: Iterable[ScoreRow], counts: Mapping[str, int], *, max_rows: int, max_tokens: int
    ) -> None:
        """Writes rows in chunks of up to ``max_rows`` rows or ``max_tokens`` tokens, or one longer row.

        ``counts`` are read when all rows are.
        """
        partial = self.path / "chunks.partial"
        remove(partial)
        partial.mkdir()
        sizes = []
        for k, group in enumerate(_groups(rows, max_rows, max_tokens)):
            table = _unscored_table(group)
            if group[0].scored:  # as all rows are, or none
                kept = [row.trajectory.behavior_logprobs for row in group]
                table = with_logprobs(table, "behavior_logprobs", kept)
            table = _with_columns(table, [row.trajectory for row in group])
            pq.write_table(table, partial / f"chunk-{k:06}.parquet")
            decisions = sum(int(row.trajectory.loss_mask.sum()) for row in group)
            sizes.append((len(group), sum(len(row.trajectory.input_ids) for row in group), decisions))
        write_atomically(partial / "index.json", json.dumps({"chunks": sizes, "counts": dict(counts)}))
        os.replace(partial, self._chunks)

    def read_chunk(self, k: int) -> pa.Table:
        """The rows of a chunk, without what a model gives."""
        return pq.read_table(self._chunks / f"chunk-{k:06}.parquet")

    def missing_parts(self, count: int) -> list[int]:
        """The chunks, of ``count``, that are not scored."""
        present = {file.name for file in self.path.glob("part-*.parquet")}
        return [k for k in range(count) if self._part(k).name not in present]

    def write_part(
        self, k: int, chunk: pa.Table, column: str, logprobs: Sequence[np.ndarray], topk: Sequence[TopK] = ()
    ) -> None:
        """The rows of a chunk with their log-probs in ``column``, and with the likeliest tokens if they are given."""
        table = with_logprobs(chunk, column, logprobs)
        if topk:
            masks = [mask.values.to_numpy(zero_copy_only=False) for mask in chunk["loss_mask"]]
            table = _with_topk(table, masks, topk)
        partial = self._part(k).with_suffix(f".{os.getpid()}.partial")
        with appearing(self._part(k), partial):
            pq.write_table(table, partial)

    def finish(self, counts: Mapping[str, int], parts: int, *, scored: bool) -> None:
        """Joins the parts (the chunks, where no model was needed) into the output, a row group each."""
        paths = [self._part(k) if scored else self._chunks / f"chunk-{k:06}.parquet" for k in range(parts)]
        said = json.dumps({"identity": self.read_identity(), "counts": dict(counts)}).encode()
        partial = self.output.with_name(self.output.name + ".partial")
        schema = pq.read_schema(paths[0])
        with appearing(self.output, partial):
            with pq.ParquetWriter(partial, schema.with_metadata({METADATA_KEY: said})) as writer:
                for path in paths:
                    table = pq.read_table(path)
                    writer.write_table(table, row_group_size=max(len(table), 1))
            sync(partial)
        self.remove()

    def _part(self, k: int) -> Path:
        return self.path / f"part-{k:06}.parquet"


def read_finished(output: Path) -> tuple[dict[str, Any], dict[str, int]] | None:
    """(identity, counts) of a scored file; None if it is none of ours."""
    try:
        said = (pq.read_schema(output).metadata or {}).get(METADATA_KEY)
    except (pa.ArrowException, OSError):
        return None
    if said is None:
        return None
    content = json.loads(said)
    return content["identity"], content["counts"]


def trajectories_of(chunk: pa.Table) -> list[Trajectory]:
    """The rows of a chunk, to be scored."""
    found = []
    for row_id, ids, mask in zip(chunk["id"], chunk["input_ids"], chunk["loss_mask"], strict=True):
        input_ids = ids.values.to_numpy()
        loss_mask = mask.values.to_numpy(zero_copy_only=False)
        found.append(
            Trajectory(row_id.as_py(), input_ids, loss_mask, np.zeros(len(input_ids), dtype=np.float32))
        )
    return found


def with_logprobs(table: pa.Table, column: str, logprobs: Sequence[np.ndarray]) -> pa.Table:
    """The table with a column of float32 lists, after ``loss_mask`` (``behavior_logprobs``, if there)."""
    position = table.column_names.index(_last_numbers(table)) + 1
    return table.add_column(position, pa.field(column, _FLOATS), pa.array(list(logprobs), type=_FLOATS))


def _with_columns(table: pa.Table, trajectories: Sequence[Trajectory]) -> pa.Table:
    """The table with what the rows brought along; all of them have a column or none has."""
    topk = [t.behavior_topk for t in trajectories if t.behavior_topk is not None]
    if topk:
        table = _with_topk(table, [t.loss_mask for t in trajectories], topk)
    reference = [t.reference_logprobs for t in trajectories if t.reference_logprobs is not None]
    return with_logprobs(table, REFERENCE, reference) if reference else table


def _with_topk(table: pa.Table, masks: Sequence[np.ndarray], topk: Sequence[TopK]) -> pa.Table:
    """The table with two columns of lists of lists, empty off the decisions, after ``behavior_logprobs``."""
    position = table.column_names.index(_last_numbers(table)) + 1
    counts = np.zeros(sum(map(len, masks)), dtype=np.int64)  # entries of every token
    counts[np.concatenate(masks)] = np.concatenate([one.counts for one in topk])
    tokens = _offsets([len(mask) for mask in masks])
    for name, values in (
        (TOPK_IDS, pa.array(np.concatenate([one.ids for one in topk]))),
        (TOPK_LOGPROBS, pa.array(np.concatenate([one.logprobs for one in topk]))),
    ):
        per_token = pa.ListArray.from_arrays(_offsets(counts), values)
        column = pa.ListArray.from_arrays(tokens, per_token)
        table = table.add_column(position, pa.field(name, column.type), column)
        position += 1
    return table


def _last_numbers(table: pa.Table) -> str:
    """The column after which others go."""
    return "behavior_logprobs" if "behavior_logprobs" in table.column_names else "loss_mask"


def _offsets(lengths: Any) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), type=pa.int32())


def _groups(rows: Iterable[ScoreRow], max_rows: int, max_tokens: int) -> Iterator[list[ScoreRow]]:
    """Consecutive rows: where a group ends depends on the rows alone, so that a resumed run has the same."""
    group: list[ScoreRow] = []
    tokens = 0
    for row in rows:
        n = len(row.trajectory.input_ids)
        if group and (len(group) == max_rows or tokens + n > max_tokens):
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += n
    if group:
        yield group


def _unscored_table(rows: Sequence[ScoreRow]) -> pa.Table:
    trajectories = [row.trajectory for row in rows]
    columns: dict[str, pa.Array] = {
        "id": pa.array([t.id for t in trajectories], type=pa.string()),
        "input_ids": pa.array([t.input_ids for t in trajectories], type=pa.list_(pa.int32())),
        "loss_mask": pa.array([t.loss_mask for t in trajectories], type=pa.list_(pa.bool_())),
        "token_weights": pa.array([t.token_weights for t in trajectories], type=_FLOATS),
        "reward": pa.array([t.reward for t in trajectories], type=pa.float64()),
        "temperature": pa.array([1.0] * len(rows), type=pa.float64()),
        "tokenizer_hash": pa.array([row.tokenizer_hash for row in rows], type=pa.string()),
        "truncated": pa.array([row.truncated for row in rows], type=pa.bool_()),
        "metadata": pa.array([row.metadata for row in rows], type=pa.string()),
    }
    return pa.table(columns)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScoreError(f"{path} cannot be read: {error}; start over with --overwrite") from error
