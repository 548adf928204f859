"""Reading rows from JSONL and Parquet files, one at a time, each with the place it came from."""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pear_megatron.data.columns import REFERENCE, TOPK_IDS, TOPK_LOGPROBS
from pear_megatron.data.errors import Problems, RowProblem
from pear_megatron.data.fields import HALF_WAY_OUT, Ragged, short

_PARQUET_BATCH = 256  # rows in memory at a time
_TOPK_BATCH = 16  # the same of a file with a list of numbers per token
_TOPK = (TOPK_IDS, TOPK_LOGPROBS)
_ONE_A_LINE = "write one object a line: jq -c '.[]' OLD.json > NEW.jsonl"
_CONVERSIONS = {
    ".json": f" ({_ONE_A_LINE})",
    ".csv": " (datasets.load_dataset('csv', data_files='OLD.csv', split='train').to_parquet('NEW.parquet'))",
    ".arrow": " (datasets.Dataset.from_file('OLD.arrow').to_parquet('NEW.parquet'))",
    ".pt": " (torch.load it and write JSON: docs/score.md)",
    ".zst": " (zstd -d)",
}
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Row:
    """A row as it stands in the file: ``where`` is FILE:LINE (FILE:ROW for Parquet), both from 1.

    ``fields`` leaves out what is null. ``size`` is the number of bytes of the file it took, for progress.
    """

    where: str
    fields: dict[str, Any]
    size: float


def expand_files(patterns: list[str], problems: Problems) -> list[Path]:
    """The files that paths and globs name, in order, globs sorted; what is missing goes to ``problems``."""
    files: dict[Path, Path] = {}  # by what they are, whatever they are called
    for pattern in patterns:
        try:
            path = Path(pattern).expanduser()
            found = (
                [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            )
        except (OSError, RuntimeError) as error:  # a name that is too long, or of nobody's home
            problems.add(pattern, f"is no path ({error}); check data.train")
            continue
        if not found:
            problems.add(pattern, "no such file; check data.train (paths are relative to where you start)")
        for file in found:
            if (same := Path(os.path.realpath(file))) in files:
                other = "" if files[same] == file else f", as {files[same]} too"
                problems.add(str(file), f"listed twice{other}; name it once in data.train")
            elif file.is_dir():
                problems.add(str(file), _way_out_of_folder(file))
            files.setdefault(same, file)
    return list(files.values())


def _way_out_of_folder(folder: Path) -> str:
    for name, split in {"state.json": "", "dataset_dict.json": "['train']"}.items():
        if (folder / name).exists():
            return (
                "is a folder of datasets.save_to_disk; write the data set as Parquet: "
                f"datasets.load_from_disk({str(folder)!r}){split}.to_parquet('FILE.parquet')"
            )
    return f"is a folder; name its files, for example {folder}/*.jsonl"


def read_rows(
    path: Path, problems: Problems, *, strict: bool = True, skip: Collection[str] = ()
) -> Iterator[Row]:
    """The rows of one file; what cannot be read goes to ``problems``, with the line and the way out.

    ``strict=False`` lets float16 log-probs pass: the caller replaces them. Fields in ``skip`` are left out of the
    rows, and columns not read.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = _read_jsonl(path, problems, skip)
    elif path.suffix == ".parquet":
        rows = _read_parquet(path, problems, strict, skip)
    else:
        way_out = _CONVERSIONS.get(path.suffix, "")
        if path.name.endswith((".ndjson", ".json", ".json.gz")) and _first_byte(path) == b"{":
            way_out = " (if it has one object a line, name it .jsonl, or .jsonl.gz)"
        problems.add(str(path), f"ends in {path.suffix!r}; expected .jsonl, .jsonl.gz or .parquet{way_out}")
        return
    before, empty = problems.total, True
    for row in rows:
        empty = False
        yield row
    if empty and problems.total == before:
        problems.add(str(path), "has no rows; write one trajectory a row, or take it out of data.train")


def _first_byte(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            return cast(BinaryIO, stream).read(64).lstrip()[:1]
    except (EOFError, OSError, zlib.error):
        return b""


def _read_jsonl(path: Path, problems: Problems, skip: Collection[str]) -> Iterator[Row]:
    number, position, rewards = 0, 0, _Rewards()
    try:
        raw = path.open("rb")
    except OSError as error:
        problems.add(str(path), f"cannot be read ({error.strerror})")
        return
    with raw:
        start = raw.peek(2)[:2]
        if start and (start == _GZIP) != (path.suffix == ".gz"):
            what = "is gzip data; name it .jsonl.gz"
            if path.suffix == ".gz":
                what = "is no gzip data; name it .jsonl"
            problems.add(str(path), f"{what}, or copy it again")
            return
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
        lines = iter(stream)
        while True:
            number += 1
            try:
                line = next(lines, None)
            except (EOFError, OSError, zlib.error) as error:
                problems.add(f"{path}:{number}", f"cannot be read further ({error}); copy the file again")
                return
            if line is None:
                return
            size, position = raw.tell() - position, raw.tell()
            if not line.strip():
                continue
            try:
                fields = _parse(line)
                rewards.check(fields, f"{path}:{number}")
                yield Row(f"{path}:{number}", _given(fields, skip), size)
            except RowProblem as problem:
                problems.add(f"{path}:{number}", problem)


def _given(fields: dict[str, Any], skip: Collection[str] = ()) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None and name not in skip}


class _Rewards:
    """Tells rewards that are null beside others of the same file: such a row would count as 1, ungraded as it is."""

    def __init__(self) -> None:
        self._first: dict[bool, str] = {}  # of rows with a reward, and with null: the place

    def check(self, fields: dict[str, Any], where: str) -> None:
        """RowProblem where both are in the file."""
        if "reward" not in fields:
            return
        here = fields["reward"] is not None
        self._first.setdefault(here, where)
        if not here and True in self._first:
            raise RowProblem(
                f"reward is null, and not in other rows ({self._first[True]}); grade the row, or drop it"
            )
        if here and self._first.get(False) and self._first[True] == where:
            raise RowProblem(
                f"reward is null in other rows ({self._first[False]}) and not in this one; grade them, or drop them"
            )


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_object)
    except RowProblem:
        raise
    except RecursionError:
        raise RowProblem("not valid JSON: nested too deep; write one JSON object a line") from None
    except ValueError as error:
        if b"\r" in line.strip():
            raise RowProblem(
                "not valid JSON: the lines end with CR alone; end them with LF (tr '\\r' '\\n' < OLD > NEW)"
            ) from None
        if line.strip() in (b"[", b"[{"):
            raise RowProblem(f"the file is one JSON list; {_ONE_A_LINE}") from None
        if not line.endswith(b"\n"):
            raise RowProblem(
                f"the last line is cut off ({error}); the file was written or copied in part: write it again"
            ) from None
        raise RowProblem(f"not valid JSON: {error}; write one JSON object a line") from None
    if isinstance(value, list):
        raise RowProblem(f"{short(value)} is a list; {_ONE_A_LINE}")
    if not isinstance(value, dict):
        raise RowProblem(f"{short(value)} is no JSON object; write one a line, {{...}}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowProblem(f"{twice!r} is twice in one JSON object, and only the last would be read; keep one")
    return found


def _read_parquet(path: Path, problems: Problems, strict: bool, skip: Collection[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, rewards = 0, _Rewards()
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            try:
                if strict:
                    _refuse_half(schema)
            except RowProblem as problem:
                problems.add(str(path), problem)
                return
            size = path.stat().st_size / max(file.metadata.num_rows, 1)
            wanted = [name for name in schema.names if name not in skip]
            values_of = {name: _ragged if name in _TOPK else _value for name in wanted}
            rows = _TOPK_BATCH if any(name in wanted for name in _TOPK) else _PARQUET_BATCH
            for batch in file.iter_batches(batch_size=rows, columns=wanted if skip else None):
                columns = dict(zip(wanted, batch.columns, strict=True))
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        values = {name: values_of[name](column[i]) for name, column in columns.items()}
                        rewards.check(values, f"{path}:{number}")
                    except RowProblem as problem:
                        problems.add(f"{path}:{number}", problem)
                        continue
                    yield Row(f"{path}:{number}", _given(values), size)
    except pa.ArrowNotImplementedError as error:
        problems.add(
            str(path), f"has a column that pyarrow cannot read ({short(str(error))}); write it as JSONL"
        )
    except (pa.ArrowException, OSError) as error:
        place = f"{path}:{number + 1}" if number else str(path)
        problems.add(place, f"is not a whole Parquet file ({short(str(error))}); write or copy it again")


def _refuse_half(schema: Any) -> None:
    import pyarrow.types as types

    for name in ("behavior_logprobs", TOPK_LOGPROBS, REFERENCE):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        item = kind
        while hasattr(item, "value_type"):  # lists of any kind, and dictionaries
            item = item.value_type
        if types.is_float16(item):
            raise RowProblem(f"column {name} is {kind}: float16, {HALF_WAY_OUT}")


def _value(scalar: Any) -> Any:
    """A row's value of a column; what is nested has no null keys: a struct has every key of every row."""
    import pyarrow as pa
    import pyarrow.types as types

    values = getattr(scalar, "values", None) if scalar.is_valid else None
    if isinstance(values, pa.Array):
        kind = values.type
        if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
            # Lists of numbers stay arrays: building a Python object for every token is the slow part.
            return scalar.as_py() if values.null_count else values.to_numpy(zero_copy_only=False)
    return _plain(scalar.as_py(maps_as_pydicts="strict"), scalar.type)


def _plain(value: Any, kind: Any) -> Any:
    """Columns of Parquet's type JSON hold it as text, also within lists and structs; nulls in it stay, as in JSONL."""
    if value is None:
        return None
    if getattr(kind, "extension_name", None) == "arrow.json":
        try:
            return json.loads(value, object_pairs_hook=_object)
        except ValueError as error:
            raise RowProblem(f"a column of type JSON holds {short(value)}, which is none ({error})") from None
    if isinstance(value, list):
        return [_plain(inner, kind.value_type) for inner in value]
    if isinstance(value, dict):
        types = {key: getattr(kind, "item_type", None) or kind.field(key).type for key in value}
        return {key: _plain(inner, types[key]) for key, inner in value.items() if inner is not None}
    return value


def _ragged(scalar: Any) -> Any:
    """A list of lists of numbers as arrays; anything else as ``_value`` has it, for the message."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = getattr(scalar, "values", None) if scalar.is_valid else None
    if isinstance(lists, pa.Array) and hasattr(lists, "flatten") and not pa.types.is_struct(lists.type):
        values = lists.flatten()  # of structs, as a map has them, a list of fields
        if values.null_count == 0 and (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
            lengths = pc.fill_null(pc.list_value_length(lists), 0)
            return Ragged(values.to_numpy(), lengths.to_numpy(zero_copy_only=False).astype("int64"))
    return _value(scalar)
