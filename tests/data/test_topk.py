"""behavior_topk and reference_logprobs: from the row through the store to a batch and its context-parallel shards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sample_rows import a_row, write_jsonl, write_parquet

from pear_megatron import PearConfig
from pear_megatron.data import DataConfig, DataError, DataSource, TrajectoryDataset, collate, prepare
from pear_megatron.data.columns import ALL_COLUMNS, NO_COLUMNS, Columns
from pear_megatron.data.sources import open_sources, prepare_sources

Config = Callable[..., DataConfig]
KL = Columns.of(PearConfig(base_loss="kl"))


def a_topk_row(n: int = 8, prompt: int = 3, **changes: Any) -> dict[str, Any]:
    """``a_row`` with 2 or 3 entries per decision: the sampled token (anywhere among them) and others, mass below 1."""
    row = a_row(n, prompt)
    ids: list[Any] = [None] * prompt
    logprobs: list[Any] = [None] * prompt
    for i in range(prompt, n):
        own = row["behavior_logprobs"][i]
        rest = math.log((1 - math.exp(own)) / 4)
        entries = [(40 + i, rest), (row["input_ids"][i], own), (60 + i, rest - 0.5)][: 2 + i % 2]
        ids.append([entry for entry, _ in entries])
        logprobs.append([value for _, value in entries])
    reference = [None if v is None else v - 0.25 for v in row["behavior_logprobs"]]
    topk = {"behavior_topk_ids": ids, "behavior_topk_logprobs": logprobs, "reference_logprobs": reference}
    row.update(topk | changes)
    return {name: value for name, value in row.items() if value is not None}


def open_rows(
    file: Path, config: Config, columns: Columns = ALL_COLUMNS, **options: Any
) -> TrajectoryDataset:
    return TrajectoryDataset.open(prepare(config(file), columns=columns, **options))


def entries_of(row: dict[str, Any]) -> list[dict[int, np.float32]]:
    """Of each decision {id: log-prob}."""
    pairs = zip(row["behavior_topk_ids"], row["behavior_topk_logprobs"], strict=True)
    return [dict(zip(i, np.float32(v), strict=True)) for i, v in pairs if i is not None]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "empty lists"])
def test_rows_come_back_from_the_store_ragged_and_float32(kind: str, tmp_path: Path, config: Config) -> None:
    rows = [a_topk_row(), a_topk_row(n=5, prompt=1), a_topk_row(n=6)]
    if kind == "empty lists":
        names = ("behavior_topk_ids", "behavior_topk_logprobs")
        written = [row | {name: [v or [] for v in row[name]] for name in names} for row in rows]
    else:
        written = rows
    write = write_jsonl if kind == "jsonl" else write_parquet
    dataset = open_rows(write(tmp_path / f"a.{'jsonl' if kind == 'jsonl' else 'parquet'}", written), config)
    assert dataset.meta["topk_width"] == 3
    for trajectory, row in zip(dataset, rows, strict=True):
        topk = trajectory.behavior_topk
        assert topk is not None
        assert (topk.ids.dtype, topk.logprobs.dtype) == (np.int32, np.float32)
        ids, logprobs = topk.padded(3)
        found = [
            {i: v for i, v in zip(*pair, strict=True) if i >= 0} for pair in zip(ids, logprobs, strict=True)
        ]
        assert found == entries_of(row)
        assert (logprobs[ids < 0] == -np.inf).all()
        given = np.array([0.0 if v is None else v for v in row["reference_logprobs"]], np.float32)
        np.testing.assert_array_equal(trajectory.reference_logprobs, given)


def test_columns_that_the_loss_does_not_need_are_neither_checked_nor_kept(
    tmp_path: Path, config: Config
) -> None:
    broken = a_topk_row(reference_logprobs=[1.0], behavior_topk_ids=[[1]])
    file = write_jsonl(tmp_path / "a.jsonl", [broken])
    folder = prepare(config(file), columns=NO_COLUMNS)
    assert not list(folder.glob("*topk*")) + list(folder.glob("reference*"))
    trajectory = TrajectoryDataset.open(folder)[0]
    assert trajectory.behavior_topk is None
    assert trajectory.reference_logprobs is None
    assert Columns.of(PearConfig()) == NO_COLUMNS
    parquet = write_parquet(tmp_path / "a.parquet", [broken])
    assert len(open_rows(parquet, config, NO_COLUMNS)) == 1


@pytest.mark.parametrize(
    ("pear", "field", "way_out"),
    [
        (PearConfig(base_loss="kl"), "behavior_topk_ids", "pear-megatron score --top-k 64"),
        (PearConfig(ratio="reference"), "reference_logprobs", "pear-megatron score --as reference"),
    ],
)
def test_a_needed_column_that_is_missing_is_named_with_the_way_out(
    pear: PearConfig, field: str, way_out: str, tmp_path: Path, config: Config
) -> None:
    file = write_jsonl(
        tmp_path / "a.jsonl", [a_topk_row(), a_topk_row(**{field: None, "behavior_topk_logprobs": None})]
    )
    with pytest.raises(DataError, match=rf"a\.jsonl:2: missing field '{field}'.*{way_out}"):
        open_rows(file, config, Columns.of(pear))


def test_a_column_that_is_used_if_it_is_there_is_in_all_rows_or_in_none(
    tmp_path: Path, config: Config
) -> None:
    floor = Columns.of(PearConfig(negative_floor=1.0))
    rows = [a_topk_row(), a_topk_row(reference_logprobs=None)]
    with pytest.raises(
        DataError, match=r"b\.jsonl:2: reference_logprobs is in some rows and not in others: .*:1 has it"
    ):
        open_rows(write_jsonl(tmp_path / "b.jsonl", rows), config, floor)
    for row in rows:
        dataset = open_rows(write_jsonl(tmp_path / "c.jsonl", [row, row]), config, floor)
        assert dataset.has("reference_logprobs") == ("reference_logprobs" in row)
        assert not dataset.has("behavior_topk_ids")


def test_sources_of_a_blend_all_have_it_or_none_and_share_a_width(tmp_path: Path, config: Config) -> None:
    narrow = a_topk_row(n=5, prompt=4)
    narrow["behavior_topk_ids"][4] = narrow["behavior_topk_ids"][4][:2]
    narrow["behavior_topk_logprobs"][4] = narrow["behavior_topk_logprobs"][4][:2]
    bare = a_topk_row(behavior_topk_ids=None, behavior_topk_logprobs=None)
    files = {"wide": [a_topk_row()], "narrow": [narrow], "bare": [bare]}
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}

    def opened(*names: str) -> Any:
        sources = [DataSource(path=[str(paths[name])], name=name) for name in names]
        settings = config("-").model_copy(update={"train": sources})
        need = {"require_behavior_logprobs": True, "vocab_size": None, "columns": ALL_COLUMNS}
        return open_sources(prepare_sources(settings, sources, **need), sources)

    batch = collate(opened("narrow", "wide"), [[0, 1], []], 16)
    assert batch.behavior_topk is not None
    assert batch.behavior_topk[0].shape == (2, 16, 3)
    with pytest.raises(
        DataError, match="behavior_topk_ids is in the rows of source wide and not in those of source bare"
    ):
        opened("wide", "bare")


def changed(column: str, token: int, value: Any) -> dict[str, Any]:
    row = copy.deepcopy(a_topk_row())
    row[column][token] = value
    return row


IDS, LOGPROBS = "behavior_topk_ids", "behavior_topk_logprobs"
FULL = a_topk_row()
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one of the two": (a_topk_row(behavior_topk_logprobs=None), "missing field 'behavior_topk_logprobs'"),
    "short": (a_topk_row(behavior_topk_ids=FULL[IDS][:7]), "behavior_topk_ids has 7 entries and input_ids 8"),
    "unlike lengths": (changed(LOGPROBS, 4, [-1.0]), r"behavior_topk_ids\[4\] has 2 entries .*\[4\] 1"),
    "null on a decision": (
        changed(IDS, 4, None) | {LOGPROBS: changed(LOGPROBS, 4, None)[LOGPROBS]},
        r"behavior_topk_ids\[4\] is empty on a decision",
    ),
    "mass": (
        changed(LOGPROBS, 4, [-0.1, FULL[LOGPROBS][4][1]]),
        r"behavior_topk_logprobs\[4\] has probabilities that add up to 1\.7",
    ),
    "another log-prob": (
        changed(LOGPROBS, 4, [-5.0, -0.21]),
        r"behavior_logprobs\[4\] = -0\.2, but the sampled token's entry in behavior_topk_logprobs\[4\] is -0\.21",
    ),
    "shifted": (
        a_topk_row(**{name: [*FULL[name][:3], *FULL[name][4:], FULL[name][3]] for name in (IDS, LOGPROBS)}),
        r"behavior_topk_ids\[3\] does not have the sampled token input_ids\[3\] = 4",
    ),
    "twice": (
        changed(IDS, 5, [6, 6, 65]),
        r"behavior_topk_ids\[5\] has the id 6 twice",
    ),
    "outside": (changed(IDS, 4, [100, 5]), r"behavior_topk_ids\[4\]\[0\] = 100 is outside the vocabulary of 100"),
    "padding": (changed(IDS, 4, [5, -1]), r"behavior_topk_ids\[4\]\[1\] = -1 is outside"),
    "positive": (changed(LOGPROBS, 4, [0.2, -0.2]), r"behavior_topk_logprobs\[4\]\[0\] = 0\.2 is positive"),
    "minus infinity": (
        changed(LOGPROBS, 4, [-math.inf, -0.2]),
        r"behavior_topk_logprobs\[4\]\[0\] = -inf is not finite",
    ),
    "text": (changed(IDS, 4, ["5", "6"]), r"behavior_topk_ids\[4\]\[0\] = '5'; it must be a list with a list of int"),
    "null": (changed(LOGPROBS, 4, [-1.0, None]), r"behavior_topk_logprobs\[4\]\[1\] = None; it must be"),
    "flat": (changed(IDS, 4, 5), r"behavior_topk_ids\[4\] = 5; it must be a list with a list"),
    "no list": (a_topk_row(behavior_topk_ids=3), "behavior_topk_ids = 3 is a int"),
    "too many": (
        changed(IDS, 4, [5, *range(200, 328)]) | {LOGPROBS: changed(LOGPROBS, 4, [-0.2] + [-9.0] * 128)[LOGPROBS]},
        r"behavior_topk_ids\[4\] has more than 128 entries",
    ),
    "reference": (a_topk_row(reference_logprobs=[0.0] * 7), "reference_logprobs has 7 entries and input_ids 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_entries_are_named(name: str, tmp_path: Path, config: Config) -> None:
    row, message = BAD[name]
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        open_rows(write_jsonl(tmp_path / "a.jsonl", [a_topk_row(), row]), config, vocab_size=100)


def test_float16_columns_are_refused(tmp_path: Path, config: Config) -> None:
    table = pq.read_table(write_parquet(tmp_path / "a.parquet", [a_topk_row()]))
    i = table.column_names.index(LOGPROBS)
    half = table.column(i).cast(pa.list_(pa.list_(pa.float16())))
    pq.write_table(table.set_column(i, LOGPROBS, half), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column behavior_topk_logprobs is .*: float16"):
        open_rows(tmp_path / "a.parquet", config)


def test_a_batch_has_them_where_the_labels_are_and_every_shard_its_part(
    tmp_path: Path, config: Config
) -> None:
    rows = [a_topk_row(n=6, prompt=2), a_topk_row(n=8), a_topk_row(n=4)]
    dataset = open_rows(write_jsonl(tmp_path / "a.jsonl", rows), config, KL)
    batch = collate(dataset, [[1, 0], [2]], 16, multiple=4)
    assert batch.behavior_topk is not None
    assert batch.reference_logprobs is None  # KL does not need it
    ids, logprobs = batch.behavior_topk
    assert (ids.shape, ids.dtype, logprobs.dtype) == ((2, 16, 3), torch.int32, torch.float32)
    assert (ids[~batch.loss_mask] == -1).all()
    assert (logprobs[~batch.loss_mask] == -torch.inf).all()
    # Position p holds the distribution that predicted label p.
    own = torch.where(ids == batch.labels[..., None], logprobs, 0.0).sum(-1)
    torch.testing.assert_close(own, batch.behavior_logprobs)
    order = [*rows[1][IDS][3:], *rows[0][IDS][2:], *rows[2][IDS][3:]]
    assert [sorted(i for i in e.tolist() if i >= 0) for e in ids[batch.loss_mask]] == [
        sorted(e) for e in order
    ]
    shards = [batch.shard(rank, 2) for rank in range(2)]
    for shard in shards:
        assert shard.behavior_topk is not None
        own = torch.where(shard.behavior_topk[0] == shard.labels[..., None], shard.behavior_topk[1], 0.0).sum(
            -1
        )
        torch.testing.assert_close(own, shard.behavior_logprobs)
    parts = torch.cat([s.behavior_topk[0].flatten(0, 1) for s in shards])
    assert sorted(parts.tolist()) == sorted(ids.flatten(0, 1).tolist())
    assert batch.to("meta").behavior_topk[1].device.type == "meta"


def test_padding_alone_has_the_columns_too(tmp_path: Path, config: Config) -> None:
    dataset = open_rows(write_jsonl(tmp_path / "a.jsonl", [a_topk_row()]), config)
    batch = collate(dataset, [[], []], 16)
    assert batch.behavior_topk is not None
    assert batch.behavior_topk[0].shape == (2, 16, 3)
    assert batch.reference_logprobs is not None
    assert not batch.reference_logprobs.any()


def test_reference_is_shifted_as_behavior_is(tmp_path: Path, config: Config) -> None:
    dataset = open_rows(write_jsonl(tmp_path / "a.jsonl", [a_topk_row(), a_topk_row(n=5)]), config)
    batch = collate(dataset, [[0, 1]], 16, multiple=4)
    expected = torch.where(batch.loss_mask, batch.behavior_logprobs - 0.25, 0.0)
    torch.testing.assert_close(batch.reference_logprobs, expected)
    for rank in range(2):
        shard = batch.shard(rank, 2)
        expected = torch.where(shard.loss_mask, shard.behavior_logprobs - 0.25, 0.0)
        torch.testing.assert_close(shard.reference_logprobs, expected)


def test_fingerprints_tell_other_entries_apart_and_a_damaged_cache_is_refused(
    tmp_path: Path, config: Config
) -> None:
    other = copy.deepcopy(a_topk_row(id="a"))
    other[LOGPROBS][4][0] -= 0.5
    files = [write_jsonl(tmp_path / f"{k}.jsonl", [row]) for k, row in enumerate([a_topk_row(id="a"), other])]
    folders = [prepare(config(file), columns=columns) for file in files for columns in (KL, NO_COLUMNS)]
    prints = [TrajectoryDataset.open(folder).fingerprint() for folder in folders]
    assert len(set(prints)) == 3  # without the entries the two files are the same
    (folders[0] / "topk_counts.npy").unlink()
    with pytest.raises(DataError, match="not a whole data cache"):
        TrajectoryDataset.open(folders[0])
