"""The cache holds what the files say, and is there whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from sample_rows import a_row, write_jsonl, write_parquet

from pear_megatron.data import DataConfig, DataError, TrajectoryDataset, prepare
from pear_megatron.data.prepare import cache_path
from pear_megatron.data.store import TrajectoryWriter
from tests.full_disk import files_up_to

Config = Callable[..., DataConfig]

ROWS = [
    a_row(id="first", reward=-0.5, metadata={"anything": [1, 2]}),
    a_row(n=5, prompt=1, id="zweite Ähre", tokenizer_hash="cafe", temperature=1.0),
    a_row(n=12, prompt=4, id="3", loss_mask=[0] * 4 + [1, 0] * 4, truncated=False),
]


def same(one: TrajectoryDataset, other: TrajectoryDataset) -> bool:
    names = ("input_ids", "loss_mask", "behavior_logprobs")
    return len(one) == len(other) and all(
        (a.id, a.reward) == (b.id, b.reward)
        and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
        for a, b in zip(one, other, strict=True)
    )


def test_a_trajectory_comes_back_as_it_was_written(tmp_path: Path, config: Config) -> None:
    dataset = TrajectoryDataset.open(prepare(config(write_jsonl(tmp_path / "a.jsonl", ROWS))))
    assert [t.id for t in dataset] == ["first", "zweite Ähre", "3"]
    assert list(dataset.lengths) == [8, 5, 12]
    assert list(dataset.num_decisions) == [5, 4, 4]
    assert list(dataset.rewards) == [-0.5, 1.0, 1.0]
    assert dataset.meta["tokenizer_hash"] == "cafe"
    first = dataset[0]
    assert first.input_ids.dtype == np.int32
    assert first.loss_mask.dtype == np.bool_
    assert first.behavior_logprobs.dtype == np.float32
    np.testing.assert_array_equal(first.input_ids, ROWS[0]["input_ids"])
    np.testing.assert_allclose(first.behavior_logprobs, [0, 0, 0, -0.1, -0.2, -0.3, -0.4, -0.5], rtol=1e-6)
    assert dataset[-1].id == "3"
    with pytest.raises(IndexError):
        dataset[3]


def test_a_full_disk_leaves_nothing_and_what_killed_runs_left_goes(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [a_row(id=f"{i}") for i in range(600)])
    folder = cache_path(config(file), require_behavior_logprobs=True, vocab_size=None, tokenizer_hash=None)
    killed = folder.with_name(f".{folder.name}.partial-0123")
    killed.mkdir(parents=True)
    os.utime(killed, times=(0, 0))
    with files_up_to(9000), pytest.raises(OSError, match="File too large"):
        prepare(config(file))
    assert not list(folder.parent.iterdir())
    with TrajectoryWriter(folder.with_name("other")):  # of another run that is at work
        prepare(config(file))
        assert len(list(folder.parent.iterdir())) == 2


def test_other_rows_under_the_same_size_and_time_are_prepared_anew(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [a_row(reward=1.0)])
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    assert TrajectoryDataset.open(prepare(config(file))).rewards == [1.0]
    write_jsonl(file, [a_row(reward=0.5)])
    os.utime(file, ns=times)  # as archives do
    assert TrajectoryDataset.open(prepare(config(file))).rewards == [0.5]


def test_log_probs_off_the_decisions_do_not_matter(tmp_path: Path, config: Config) -> None:
    values = [None, 0.0, 7.0, -0.1, -0.2, -0.3, -0.4, -0.5]
    file = write_jsonl(tmp_path / "a.jsonl", [a_row(), a_row(behavior_logprobs=values)])
    one, other = TrajectoryDataset.open(prepare(config(file)))
    np.testing.assert_array_equal(one.behavior_logprobs, other.behavior_logprobs)


def test_parquet_equals_jsonl(tmp_path: Path, config: Config) -> None:
    jsonl = TrajectoryDataset.open(prepare(config(write_jsonl(tmp_path / "a.jsonl", ROWS))))
    zipped = TrajectoryDataset.open(prepare(config(write_jsonl(tmp_path / "a.jsonl.gz", ROWS))))
    graded = [{"reward": 1.0, **row} for row in ROWS]  # a column has a null where a row has no field
    parquet = TrajectoryDataset.open(prepare(config(write_parquet(tmp_path / "a.parquet", graded))))
    assert same(jsonl, zipped)
    assert same(jsonl, parquet)


def test_ids_default_to_file_and_line(tmp_path: Path, config: Config) -> None:
    write_jsonl(tmp_path / "b.jsonl", [a_row()])
    write_jsonl(tmp_path / "a.jsonl", [a_row(), a_row()])
    dataset = TrajectoryDataset.open(prepare(config(tmp_path / "*.jsonl")))
    places = ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert [t.id for t in dataset] == [str(tmp_path / place) for place in places]


def test_the_cache_is_made_once_and_again_when_anything_changes(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    folder = prepare(config(file))
    made = (folder / "meta.json").stat().st_mtime_ns
    assert prepare(config(file)) == folder
    assert (folder / "meta.json").stat().st_mtime_ns == made
    others = [prepare(config(file, seq_length=11)), prepare(config(file), vocab_size=50)]
    os.utime(file, ns=(1, 1))
    others.append(prepare(config(file)))
    assert len({folder, *others}) == 4


def test_the_cache_lies_beside_the_data_by_default(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert prepare(config(file, cache_dir=None)).parent == tmp_path / ".pear_cache"


def test_interrupted_preparation_leaves_nothing(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: TrajectoryWriter, meta: object) -> None:
        raise KeyboardInterrupt

    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryWriter, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(file))
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(TrajectoryDataset.open(prepare(config(file)))) == 3


def test_killed_preparation_leaves_nothing_readable(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    folder = tmp_path / "cache" / "key"
    dataset = TrajectoryDataset.open(prepare(config(file)))
    writer = TrajectoryWriter(folder)  # as a SIGKILL leaves it: never closed, never committed
    for trajectory in dataset:
        writer.append(trajectory)
    assert not folder.exists()
    left = next(path for path in folder.parent.iterdir() if path.name.startswith(".key.partial-"))
    with pytest.raises(DataError, match="not a whole data cache"):
        TrajectoryDataset.open(left)


@pytest.mark.parametrize("victim", ["meta.json", "input_ids.npy", "rewards.npy"])
def test_damaged_cache_is_refused_and_made_again(victim: str, tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    folder = prepare(config(file))
    content = (folder / victim).read_bytes()
    (folder / victim).write_bytes(content[:-4])
    with pytest.raises(DataError, match=r"not a whole data cache .*; delete the folder"):
        TrajectoryDataset.open(folder)
    assert prepare(config(file)) == folder
    assert (folder / victim).read_bytes() == content


def test_two_jobs_may_prepare_the_same_data(tmp_path: Path, config: Config) -> None:
    dataset = TrajectoryDataset.open(prepare(config(write_jsonl(tmp_path / "a.jsonl", ROWS))))
    folder = tmp_path / "cache" / "shared"
    for _ in range(2):
        with TrajectoryWriter(folder) as writer:
            for trajectory in dataset:
                writer.append(trajectory)
            writer.commit({"counts": {}, "notes": {}, "files": [], "tokenizer_hash": None})
    assert same(TrajectoryDataset.open(folder), dataset)
    assert not list(folder.parent.glob(".shared*"))


def test_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    append = TrajectoryWriter.append

    def append_and_touch(self: TrajectoryWriter, trajectory: object) -> None:
        append(self, trajectory)  # type: ignore[arg-type]
        os.utime(file, ns=(1, 1))

    monkeypatch.setattr(TrajectoryWriter, "append", append_and_touch)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(config(file))


def test_cache_folder_that_cannot_be_written_names_the_way_out(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"a\.jsonl/x: cannot be written to .* set data\.cache_dir"):
        prepare(config(file, cache_dir=str(file / "x")))


def test_progress_bar_is_shown_on_request(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    prepare(config(file), progress=True)
    assert "reading trajectories" in capsys.readouterr().err


def test_data_error_survives_the_way_between_ranks() -> None:
    error = pickle.loads(pickle.dumps(DataError(["a.jsonl:1: bad"], 3, 2)))
    assert (error.problems, error.total, error.listed) == (["a.jsonl:1: bad"], 3, 2)
    assert str(error).endswith("... and 1 more")


def test_config_takes_one_file_or_many_and_refuses_typos() -> None:
    assert DataConfig(train="a.jsonl", seq_length=8).train == ["a.jsonl"]
    assert json.loads(DataConfig(train=["a", "b"], seq_length=8).model_dump_json())["train"] == ["a", "b"]
    with pytest.raises(ValidationError, match="did you mean 'seq_length'"):
        DataConfig(train="a", seq_len=8)  # type: ignore[call-arg]
    for bad in ({"train": []}, {"seq_length": 0}, {"overlong": "cut"}):
        with pytest.raises(ValidationError):
            DataConfig(**{"train": "a", "seq_length": 8, **bad})
