"""Whatever a data file holds: a whole cache, or a DataError that names file and place."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_megatron.data import DataConfig, DataError, Trajectory, TrajectoryDataset, prepare
from pear_megatron.data.columns import ALL_COLUMNS, NO_COLUMNS
from pear_megatron.data.errors import Problems, RowProblem
from pear_megatron.data.files import read_rows
from pear_megatron.data.validate import Validator
from tests.byte_tokenizer import make_byte_tokenizer
from tests.fuzz.rows import IDS, OF_TEXT, WITH_IDS
from tests.fuzz.values import damaged, damaged_bytes, examples, folder_alone, json_values

VOCABULARY = 258


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_of(good: list[dict[str, Any]]) -> st.SearchStrategy[list[Any]]:
    one = st.sampled_from(good).flatmap(damaged) | st.sampled_from(good) | json_values
    return st.lists(one, min_size=1, max_size=3)


def check(trajectory: Trajectory) -> None:
    ids, mask = trajectory.input_ids, trajectory.loss_mask
    assert len(ids) == len(mask) == len(trajectory.behavior_logprobs)
    assert mask.any()
    assert not mask[0]
    assert ((ids >= 0) & (ids < VOCABULARY)).all()
    assert np.isfinite(trajectory.behavior_logprobs).all()
    assert (trajectory.behavior_logprobs <= 0).all()
    assert np.isfinite(trajectory.reward)
    if trajectory.behavior_topk is not None:
        assert (trajectory.behavior_topk.counts > 0).all()
        assert np.isfinite(trajectory.behavior_topk.logprobs).all()


def prepare_or_refuse(file: Path, **options: Any) -> None:
    config = DataConfig(train=[str(file)], seq_length=16, cache_dir=str(file.parent / "cache"), **options)
    columns = ALL_COLUMNS if options.get("truncated") != "keep" else NO_COLUMNS
    try:
        folder = prepare(config, vocab_size=VOCABULARY, columns=columns, require_behavior_logprobs=False)
    except DataError as error:
        for problem in error.problems:
            assert problem.startswith((str(file), "data.train: no trajectory is left"))
        assert list((file.parent / "cache").glob("*")) == []
    else:
        for trajectory in TrajectoryDataset.open(folder):
            check(trajectory)


policies = st.fixed_dictionaries(
    {"truncated": st.sampled_from(["drop", "keep", "error"]), "overlong": st.sampled_from(["error", "drop"])}
)


@examples(60)
@given(
    rows=rows_of([*WITH_IDS, OF_TEXT[0]]),
    data=st.data(),
    policies=policies,
    suffix=st.sampled_from(["", ".gz"]),
)
def test_jsonl(rows: list[Any], data: st.DataObject, policies: dict[str, Any], suffix: str) -> None:
    content = as_lines(rows)
    content = gzip.compress(content, mtime=0) if suffix else content
    with folder_alone() as folder:
        file = folder / f"a.jsonl{suffix}"
        file.write_bytes(data.draw(damaged_bytes(content)))
        prepare_or_refuse(file, **policies)


TYPES: list[pa.DataType] = [
    pa.list_(pa.int32()), pa.list_(pa.int64()), pa.list_(pa.uint64()), pa.list_(pa.int8()), pa.list_(pa.bool_()),
    pa.list_(pa.float16()), pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32()),
    pa.list_view(pa.int32()), pa.list_(pa.int32(), 6), pa.list_(pa.string()), pa.list_(pa.decimal128(9, 2)),
    pa.list_(pa.list_(pa.int32())), pa.list_(pa.list_(pa.float32())), pa.list_(pa.list_(pa.list_(pa.float32()))),
    pa.map_(pa.string(), pa.float32()), pa.list_(pa.map_(pa.string(), pa.float32())), pa.map_(pa.int32(), pa.int32()),
    pa.struct({"a": pa.int32()}), pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})), pa.string(),
    pa.binary(), pa.bool_(), pa.float64(), pa.int64(), pa.timestamp("us"), pa.date32(), pa.duration("s"), pa.null(),
    pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.timestamp("us")), pa.list_(pa.null()), pa.time64("us"),
]  # fmt: skip


@functools.cache
def values_of(kind: pa.DataType) -> st.SearchStrategy[Any]:
    """Python values of an Arrow type, null among them."""
    t = pa.types
    own: st.SearchStrategy[Any]
    if t.is_map(kind):
        keys = values_of(kind.key_type).filter(lambda key: key is not None)
        own = st.lists(st.tuples(keys, values_of(kind.item_type)), max_size=2)
    elif t.is_struct(kind):
        own = st.fixed_dictionaries({f.name: values_of(f.type) for f in kind})
    elif t.is_nested(kind):
        items = values_of(kind.value_type)
        own = st.lists(items, min_size=6, max_size=6)
        if not t.is_fixed_size_list(kind):
            own |= st.lists(items, max_size=6)
    elif t.is_dictionary(kind) or t.is_string(kind):
        own = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    elif t.is_binary(kind):
        own = st.binary(max_size=4)
    elif t.is_boolean(kind):
        own = st.booleans()
    elif t.is_floating(kind):
        own = st.floats(width=16) | st.sampled_from([-0.5, -0.25])
    elif t.is_decimal(kind):
        own = st.integers(0, 9)
    elif t.is_null(kind):
        own = st.none()
    else:
        own = st.integers(0, 100)
    return own | st.none()


@st.composite
def tables(draw: Any) -> pa.Table:
    """A table of good columns, some of which have another type and other values."""
    good = draw(st.sampled_from(WITH_IDS))
    count = draw(st.integers(1, 3))
    columns = {name: pa.array([value] * count) for name, value in good.items() if name != "metadata"}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(
            st.sampled_from([*good, "id", "messages", "tools", "reward", "metadata", "reference_logprobs"])
        )
        kind = draw(st.sampled_from(TYPES))
        columns[name] = pa.array(draw(st.lists(values_of(kind), min_size=count, max_size=count)), type=kind)
    return pa.table(columns)


@examples(60)
@given(table=tables(), data=st.data(), policies=policies)
def test_parquet(table: pa.Table, data: st.DataObject, policies: dict[str, Any]) -> None:
    with folder_alone() as folder:
        file = folder / "a.parquet"
        try:
            pq.write_table(table, file)
        except pa.ArrowException:  # a type that Parquet has no place for
            return
        if data.draw(st.integers(0, 3)) == 0:
            file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
        prepare_or_refuse(file, **policies)


@functools.cache
def tokenizer() -> Any:
    pytest.importorskip("transformers", reason="needs the extra hf")
    return make_byte_tokenizer()


@examples(60)
@given(rows=rows_of([*OF_TEXT, IDS]), multi_turn=st.sampled_from(["auto", "whole", "split"]))
def test_text(rows: list[Any], multi_turn: Any) -> None:
    config = DataConfig(train=["-"], seq_length=256, multi_turn=multi_turn, tokenizer="bytes")
    read = Validator(config, require_behavior_logprobs=None, columns=ALL_COLUMNS, tokenizer=tokenizer())
    problems = Problems()
    with folder_alone() as folder:
        (folder / "a.jsonl").write_bytes(as_lines(rows))
        for row in read_rows(folder / "a.jsonl", problems):
            try:
                for trajectory in read(row):
                    check(trajectory)
            except RowProblem:
                pass
