"""Parquet columns of every type that writers use for the same thing are read as that thing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_megatron.data import DataConfig, DataError, TrajectoryDataset, prepare
from pear_megatron.data.errors import Problems
from pear_megatron.data.files import read_rows

Config = Callable[..., DataConfig]

IDS = [[1, 2, 3, 4], [5, 6, 7, 8]]
LOGPROBS = [[0.0, -0.25, -0.5, -0.125], [0.0, -1.0, -2.0, -3.0]]
LISTS: dict[str, Callable[[pa.DataType], pa.DataType]] = {
    "list": pa.list_,
    "large_list": pa.large_list,
    "fixed_size_list": lambda kind: pa.list_(kind, 4),
    "list_view": pa.list_view,
    "large_list_view": pa.large_list_view,
}
STRINGS = {
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}
MESSAGES = [
    [
        {"role": "user", "content": "Weather?", "tool_calls": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "get", "arguments": {"city": "Paris", "unit": None}}}],
        },
    ],
    [
        {"role": "user", "content": "Hi", "tool_calls": None},
        {"role": "assistant", "content": "Hello", "tool_calls": None},
    ],
    None,
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    problems = Problems()
    rows = [row.fields for row in read_rows(path, problems, strict=False)]
    assert problems.total == 0
    return rows


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_every_kind_are_lists(kind: str, tmp_path: Path, config: Config) -> None:
    of, path = LISTS[kind], tmp_path / "a.parquet"
    columns = {
        "input_ids": pa.array(IDS, of(pa.int64())),
        "loss_mask": pa.array([[False, True, True, True]] * 2, of(pa.bool_())),
        "behavior_logprobs": pa.array(LOGPROBS, of(pa.float32())),
        "id": pa.array(["a", "b"], pa.large_string()),
    }
    pq.write_table(pa.table(columns), path)
    dataset = TrajectoryDataset.open(prepare(config(path)))
    assert [t.id for t in dataset] == ["a", "b"]
    for trajectory, ids, logprobs in zip(dataset, IDS, LOGPROBS, strict=True):
        assert trajectory.input_ids.tolist() == ids
        np.testing.assert_array_equal(trajectory.behavior_logprobs, np.float32(logprobs))


@pytest.mark.parametrize("kind", LISTS)
def test_half_precision_is_refused_in_lists_of_every_kind(kind: str, tmp_path: Path, config: Config) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"behavior_logprobs": pa.array(LOGPROBS, LISTS[kind](pa.float16()))}), path)
    with pytest.raises(DataError, match=r"column behavior_logprobs is .*float16"):
        prepare(config(path))


def test_lists_with_nulls_inside_keep_them(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {
        "some": pa.array([[None, -0.5], [None, None]], pa.large_list(pa.float64())),
        "all": pa.array([[None, None], None]),
        "bools": pa.array([[True, None], [False, True]]),
    }
    pq.write_table(pa.table(columns), path)
    first, second = rows_of(path)
    assert first == {"some": [None, -0.5], "all": [None, None], "bools": [True, None]}
    assert second["some"] == [None, None]
    assert "all" not in second


@pytest.mark.parametrize("kind", STRINGS)
def test_strings_of_every_kind_are_text(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = ["one", "two", None, "one"]
    pq.write_table(pa.table({"prompt": pa.array(values).cast(STRINGS[kind])}), path)
    assert [row.get("prompt") for row in rows_of(path)] == values


@pytest.mark.parametrize("of", [pa.list_, pa.large_list])
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_messages_are_read_without_the_keys_that_a_struct_adds(
    of: Callable[[pa.DataType], pa.DataType], kind: str, tmp_path: Path
) -> None:
    text = STRINGS.get(kind, pa.string())
    arguments = pa.struct([("city", text), ("unit", text)])
    call = pa.struct([("function", pa.struct([("name", text), ("arguments", arguments)]))])
    message = pa.struct([("role", text), ("content", text), ("tool_calls", of(call))])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": pa.array(MESSAGES, of(message))}), path)
    call_row, plain_row, no_row = rows_of(path)
    assert call_row["messages"] == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "get", "arguments": {"city": "Paris"}}}],
        },
    ]
    assert plain_row["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    assert no_row == {}


def test_maps_are_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    kind = pa.map_(pa.string(), pa.bool_())
    pq.write_table(
        pa.table({"chat_template_kwargs": pa.array([[("enable_thinking", False)], None], kind)}), path
    )
    assert rows_of(path) == [{"chat_template_kwargs": {"enable_thinking": False}}, {}]


def test_conversations_from_parquet_become_the_tokens_of_jsonl(
    tmp_path: Path, config: Config, byte_tokenizer: Callable[..., Any]
) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "a.parquet"
    text = pa.dictionary(pa.int32(), pa.string())
    message = pa.struct([("role", text), ("content", pa.large_string()), ("name", pa.null())])
    pq.write_table(
        pa.table(
            {
                "messages": pa.array(
                    [[{"role": m["role"], "content": m["content"]} for m in MESSAGES[1]]],
                    pa.large_list(message),
                )
            }
        ),
        path,
    )
    settings = {"tokenizer": str(tmp_path / "tokenizer"), "seq_length": 128}
    (trajectory,) = TrajectoryDataset.open(prepare(config(path, **settings), require_behavior_logprobs=False))
    text = byte_tokenizer().decode(trajectory.input_ids.tolist())
    assert text == byte_tokenizer().apply_chat_template(MESSAGES[1], tokenize=False).rstrip("\n")


@pytest.mark.skipif(not hasattr(pa, "json_"), reason="this pyarrow has no type JSON")
def test_columns_of_type_json_are_what_they_say_also_in_lists_and_structs(tmp_path: Path) -> None:
    """As `datasets` 5 writes what has other keys from row to row."""
    call = {"function": {"name": "get", "arguments": {"city": "Paris", "unit": None}}}
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    as_text = pa.json_()

    def column(value: Any, kind: pa.DataType) -> pa.Array:
        if pa.types.is_list(kind):
            return pa.ListArray.from_arrays([0, len(value)], column(value, kind.value_type))
        return pa.ExtensionArray.from_storage(kind, pa.array([json.dumps(one) for one in value], pa.string()))

    columns = {
        "messages": column(chat, pa.list_(as_text)),
        "metadata": column([{"a": None}], as_text),
        "extra": pa.StructArray.from_arrays([column([[1]], as_text), pa.nulls(1)], ["kept", "null"]),
        "none": column([None], as_text),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [
        {"messages": chat, "metadata": {"a": None}, "extra": {"kept": [1]}}
    ]
    broken = pa.ExtensionArray.from_storage(as_text, pa.array(["{"], pa.string()))
    pq.write_table(pa.table({"metadata": broken}), tmp_path / "b.parquet")
    problems = Problems()
    assert list(read_rows(tmp_path / "b.parquet", problems)) == []
    with pytest.raises(DataError, match=r"b\.parquet:1: a column of type JSON holds '\{', which is none"):
        problems.raise_if_any()
