"""Every kind of bad row is refused with its file, line, field, value and a way out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sample_rows import a_row, write_jsonl, write_parquet

from pear_megatron.data import DataConfig, DataError, TrajectoryDataset, prepare

Config = Callable[..., DataConfig]


def refused(config: DataConfig, **options: Any) -> DataError:
    """What `prepare` raises."""
    with pytest.raises(DataError) as caught:
        prepare(config, **options)
    return caught.value


def with_entry(row: dict[str, Any], name: str, index: int, value: Any) -> dict[str, Any]:
    return {**row, name: [value if i == index else v for i, v in enumerate(row[name])]}


BAD_ROWS = {
    "short behavior_logprobs": (
        a_row(behavior_logprobs=[-0.5] * 5),
        ["behavior_logprobs has 5 entries and input_ids 8", "align or score it again"],
    ),
    "short loss_mask": (a_row(loss_mask=[0, 1]), ["loss_mask has 2 entries and input_ids 8"]),
    "NaN": (
        with_entry(a_row(), "behavior_logprobs", 4, float("nan")),
        ["behavior_logprobs[4] = nan, not finite", "score it again"],
    ),
    "NaN off the decisions": (
        with_entry(a_row(), "behavior_logprobs", 1, float("nan")),
        ["behavior_logprobs[1] = nan"],
    ),
    "minus infinity": (
        with_entry(a_row(), "behavior_logprobs", 5, float("-inf")),
        ["behavior_logprobs[5] = -inf, not finite"],
    ),
    "beyond float32": (with_entry(a_row(), "behavior_logprobs", 5, -1e39), ["behavior_logprobs[5] = -1e+39"]),
    "null on a decision": (
        with_entry(a_row(), "behavior_logprobs", 6, None),
        ["behavior_logprobs[6] = null on a decision"],
    ),
    "positive": (
        with_entry(a_row(), "behavior_logprobs", 4, 0.25),
        ["behavior_logprobs[4] = 0.25 is positive", "store log p"],
    ),
    "never filled in": (
        a_row(behavior_logprobs=[0.0] * 8),
        ["behavior_logprobs is 0 on all 5 decisions", "pear-megatron score"],
    ),
    "missing behavior_logprobs": (
        a_row(behavior_logprobs=None),
        [
            "missing field 'behavior_logprobs'",
            "pear-megatron score",
            "pear.variant=none, without pear.negative_floor",
        ],
    ),
    "log-probs as text": (
        with_entry(a_row(), "behavior_logprobs", 4, "-0.5"),
        ["behavior_logprobs[4] = '-0.5'; it must be a list of numbers or null"],
    ),
    "log-probs as one number": (a_row(behavior_logprobs=-0.5), ["behavior_logprobs = -0.5 is a float"]),
    "all masked": (a_row(prompt=8), ["loss_mask is all 0 over 8 tokens", "empty response", "drop the row"]),
    "no tokens": (
        a_row(input_ids=[], loss_mask=[], behavior_logprobs=[]),
        ["loss_mask is all 0 over 0 tokens", "empty response"],
    ),
    "decision without context": (
        a_row(prompt=0, behavior_logprobs=[-0.5] * 8),
        ["loss_mask[0] = 1", "no context", "BOS"],
    ),
    "over-long": (
        a_row(n=18),
        ["input_ids has 18 tokens, over-long for data.seq_length = 16", "data.overlong=drop"],
    ),
    "id outside the vocabulary": (
        with_entry(a_row(), "input_ids", 2, 100),
        ["input_ids[2] = 100 is outside the vocabulary of 100 (0 to 99)", "another tokenizer"],
    ),
    "negative token": (with_entry(a_row(), "input_ids", 7, -100), ["input_ids[7] = -100 is outside"]),
    "token as a float": (with_entry(a_row(), "input_ids", 0, 1.5), ["input_ids[0] = 1.5; it must be a list"]),
    "token beyond int64": (
        with_entry(a_row(), "input_ids", 0, 2**70),
        ["input_ids holds 1180591620717411303"],
    ),
    "list of lists": (
        a_row(input_ids=[[1, 2]] * 8),
        ["input_ids[0] = [1, 2]; it must be a list of integers"],
    ),
    "mask of 2": (with_entry(a_row(), "loss_mask", 3, 2), ["loss_mask[3] = 2", "0 or false elsewhere"]),
    "mask of a half": (with_entry(a_row(), "loss_mask", 3, 0.5), ["loss_mask[3] = 0.5", "'reward'"]),
    "mask of text": (with_entry(a_row(), "loss_mask", 3, "1"), ["loss_mask[3] = '1'"]),
    "British spelling": (
        {**{k: v for k, v in a_row().items() if k != "behavior_logprobs"}, "behaviour_logprobs": [0.1]},
        ["unknown field 'behaviour_logprobs': did you mean 'behavior_logprobs'?"],
    ),
    "another program's name": (
        {"prompt": "a", "completion": "b"},
        ["missing field 'response'", "did you mean 'response' for 'completion'?"],
    ),
    "mask beyond 64 bits": (
        with_entry(a_row(), "loss_mask", 3, 10**22),
        [f"loss_mask[3] = {10**22}; it must be"],
    ),
    "no tokens and no text": (
        {"reward": 1.0},
        ["messages (or conversations), or prompt+response", "none"],
    ),
    "two forms": (
        {**a_row(), "prompt": "a", "response": "b"},
        ["this one has input_ids+loss_mask and prompt+response"],
    ),
    "half a form": (a_row(loss_mask=None), ["missing field 'loss_mask'"]),
    "infinite reward": (a_row(reward=float("inf")), ["reward = inf is not a finite number"]),
    "boolean reward": (a_row(reward=True), ["reward = True is not a finite number"]),
    "id of a wrong type": (a_row(id=[1]), ["id = [1] is a list; it must be a string"]),
    "temperature": (a_row(temperature=0.7), ["temperature = 0.7", "temperature 1", "pear-megatron score"]),
    "truncated of a wrong type": (a_row(truncated="yes"), ["truncated = 'yes' is not a boolean"]),
    "text without a tokenizer": (
        {"prompt": "a", "response": "b"},
        ["prompt is text and data.tokenizer is not set", "input_ids+loss_mask"],
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row_is_named_by_file_line_field_and_way_out(kind: str, tmp_path: Path, config: Config) -> None:
    row, expected = BAD_ROWS[kind]
    file = write_jsonl(tmp_path / "train.jsonl", [a_row(), a_row(), row, a_row()])
    caught = refused(config(file), vocab_size=100)
    assert caught.total == 1
    message = str(caught)
    for part in [f"{file}:3: ", *expected]:
        assert part in message


BAD_LINES = {
    "bad JSON": (b'{"input_ids": [1,}\n', "not valid JSON"),
    "a list": (b"[1, 2]\n", "[1, 2] is a list; write one object a line"),
    "the start of a list": (b'[{"id": "a"},\n', "not valid JSON"),
    "a list over many lines": (b"[\n", "the file is one JSON list; write one object a line"),
    "not UTF-8": (b'{"id": "\xff"}\n', "not valid JSON"),
    "a key twice": (b'{"reward": 1, "metadata": {}, "reward": -1}\n', "'reward' is twice in one JSON object"),
    "Mac's line ends": (b'{"id": "a"}\r{"id": "b"}\r', "not valid JSON: the lines end with CR alone"),
    "cut off": (json.dumps(a_row()).encode()[:-10], "the last line is cut off"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_is_named(kind: str, tmp_path: Path, config: Config) -> None:
    line, expected = BAD_LINES[kind]
    file = write_jsonl(tmp_path / "train.jsonl", [a_row()])
    file.write_bytes(file.read_bytes() + line)
    assert f"{file}:2: {expected}" in str(refused(config(file)))


def test_cut_gzip_is_named(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "train.jsonl.gz", [a_row()] * 50)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(
        DataError, match=r"train\.jsonl\.gz:\d+: cannot be read further .* copy the file again"
    ):
        prepare(config(file))


def test_gzip_by_another_name_is_named(tmp_path: Path, config: Config) -> None:
    packed = write_jsonl(tmp_path / "a.jsonl.gz", [a_row()]).rename(tmp_path / "a.jsonl")
    plain = write_jsonl(tmp_path / "b.jsonl", [a_row()]).rename(tmp_path / "b.jsonl.gz")
    for file, message in ((packed, "is gzip data; name it"), (plain, "is no gzip data; name it")):
        caught = refused(config(file))
        assert caught.total == 1
        assert f"{file}: {message}" in str(caught)


def test_a_saved_data_set_is_told_how_to_be_written(tmp_path: Path, config: Config) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"is a folder of datasets\.save_to_disk; .*load_from_disk\(.*'\)\.to_parquet"
    ):
        prepare(config(tmp_path))
    (tmp_path / "state.json").rename(tmp_path / "dataset_dict.json")
    with pytest.raises(DataError, match=r"load_from_disk\(.*\)\['train'\]\.to_parquet"):
        prepare(config(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "way_out"),
    [
        ("a.json", b'[{"id": 1}]', r"write one object a line: jq -c"),
        ("a.json", b'\n{"id": 1}\n', r"if it has one object a line, name it \.jsonl"),
        ("a.ndjson", b'{"id": 1}\n', r"if it has one object a line, name it \.jsonl"),
        (
            "a.json.gz",
            gzip.compress(b'{"id": 1}\n', mtime=0),
            r"if it has one object a line, name it \.jsonl",
        ),
    ],
)
def test_json_by_another_name_is_told_what_to_do(
    name: str, text: bytes, way_out: str, tmp_path: Path, config: Config
) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(DataError, match=rf"ends in '\.\w+'; .*\({way_out}"):
        prepare(config(tmp_path / name))


def test_missing_empty_and_foreign_files_are_named(tmp_path: Path, config: Config) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "notes.txt").write_text("x")
    for pattern, message in {
        "nowhere*.jsonl": "no such file; check data.train",
        "empty.jsonl": "has no rows",
        "notes.txt": "ends in '.txt'; expected .jsonl, .jsonl.gz or .parquet",
        ".": "is a folder; name its files",
    }.items():
        assert f"{tmp_path / pattern}: {message}" in str(refused(config(tmp_path / pattern)))


def test_file_named_twice_is_refused(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [a_row()])
    with pytest.raises(DataError, match=r"a\.jsonl: listed twice"):
        prepare(config(file, tmp_path / "*.jsonl"))


def test_one_file_by_two_names_is_refused(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [a_row()])
    (tmp_path / "link.jsonl").symlink_to(file)
    (tmp_path / "sub").mkdir()
    for other in (tmp_path / "sub" / ".." / "a.jsonl", tmp_path / "link.jsonl"):
        assert f"{other}: listed twice, as {file} too" in str(refused(config(file, other)))


def reward_rows(*rewards: float | None) -> list[dict[str, Any]]:
    return [{**a_row(), "reward": reward} for reward in rewards]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_reward_that_is_null_beside_others_is_refused(
    write: Callable[..., Path], tmp_path: Path, config: Config
) -> None:
    file = write(tmp_path / f"a.{write.__name__.removeprefix('write_')}", reward_rows(1.0, None, -1.0, None))
    caught = refused(config(file))
    assert caught.total == 2
    assert f"{file}:2: reward is null, and not in other rows ({file}:1); grade the row" in str(caught)
    file = write(file, reward_rows(None, None, -1.0, 1.0))
    caught = refused(config(file))
    assert caught.total == 1
    assert f"{file}:3: reward is null in other rows ({file}:1)" in str(caught)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_rewards_that_are_null_throughout_are_one(
    write: Callable[..., Path], tmp_path: Path, config: Config
) -> None:
    file = write(tmp_path / f"a.{write.__name__.removeprefix('write_')}", reward_rows(None, None))
    assert [t.reward for t in TrajectoryDataset.open(prepare(config(file)))] == [1.0, 1.0]


def test_rows_without_a_reward_beside_others_are_counted(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [a_row(), a_row(reward=-1.0), a_row()])
    assert [t.reward for t in TrajectoryDataset.open(prepare(config(file)))] == [1.0, -1.0, 1.0]
    assert "rows without a reward, which count as 1, beside rows with one: 2" in caplog.text


def test_duplicated_id_names_both_places(tmp_path: Path, config: Config) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [a_row(id="a"), a_row(id="b")])
    two = write_jsonl(tmp_path / "two.jsonl", [a_row(id="c"), a_row(id="b")])
    assert f"{two}:2: id = 'b' is duplicated: {one}:2 has it too" in str(refused(config(one, two)))


def test_two_tokenizers_in_one_dataset_are_refused(tmp_path: Path, config: Config) -> None:
    rows = [a_row(tokenizer_hash="aaaa"), a_row(), a_row(tokenizer_hash="bbbb")]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    assert f"{file}:3: tokenizer_hash = 'bbbb', but an earlier row has 'aaaa'" in str(refused(config(file)))


def test_one_line_tells_of_all_rows_with_the_same_problem(tmp_path: Path, config: Config) -> None:
    rows = [a_row(reward="good"), a_row(n=20), a_row(n=1021), *[a_row(reward="bad")] * 1204]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    caught = refused(config(file))
    reward, long = caught.problems
    assert reward.startswith(f"{file}:1: reward = 'good' is not a finite number")
    assert reward.endswith(f"(1,205 rows like this: {file}:1, {file}:4, {file}:5, ...)")
    assert long.startswith(f"{file}:2: input_ids has 20 tokens, over-long")
    assert long.endswith(f"(2 rows like this: {file}:2, {file}:3)")
    assert caught.total == 1207
    assert str(caught).startswith("1,207 problems in the data:")
    assert "more" not in str(caught)


def test_twenty_kinds_of_problems_are_listed_and_all_are_counted(tmp_path: Path, config: Config) -> None:
    rows = [{**a_row(), f"{letter}eward": 1} for letter in "abcdefghijklmnopqstuvwx"]
    file = write_jsonl(tmp_path / "a.jsonl", [*rows, rows[0], rows[22]])
    caught = refused(config(file))
    assert (len(caught.problems), caught.total) == (20, 25)
    assert str(caught).startswith("25 problems in the data:")
    assert str(caught).endswith("... and 4 more")  # three kinds, one of them twice


def test_parquet_row_is_named(tmp_path: Path, config: Config) -> None:
    file = write_parquet(tmp_path / "a.parquet", [a_row(), with_entry(a_row(), "behavior_logprobs", 4, 0.5)])
    assert f"{file}:2: behavior_logprobs[4] = 0.5 is positive" in str(refused(config(file)))


def test_float16_column_is_refused_and_float64_is_converted(tmp_path: Path, config: Config) -> None:
    rows = [a_row(behavior_logprobs=[0.0] * 3 + [-0.5] * 5)] * 2
    half = write_parquet(tmp_path / "half.parquet", rows, pa.list_(pa.float16()))
    caught = refused(config(half))
    assert f"{half}: column behavior_logprobs is list<" in str(caught)
    assert "float16" in str(caught)
    assert "store float32" in str(caught)
    for kind in (pa.float32(), pa.float64()):
        dataset = TrajectoryDataset.open(
            prepare(config(write_parquet(tmp_path / f"{kind}.parquet", rows, pa.list_(kind))))
        )
        assert dataset[0].behavior_logprobs.dtype == np.float32


def test_unknown_parquet_column_that_says_something_is_refused(tmp_path: Path, config: Config) -> None:
    file = write_parquet(tmp_path / "a.parquet", [{**a_row(), "rewards": 1.0}] * 5)
    caught = refused(config(file))
    assert f"{file}:1: unknown field 'rewards': a grade is a 'reward'" in str(caught)
    assert "(5 rows like this" in str(caught)


def test_cut_parquet_is_named(tmp_path: Path, config: Config) -> None:
    file = write_parquet(tmp_path / "a.parquet", [a_row()] * 50)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.parquet: is not a whole Parquet file"):
        prepare(config(file))


def test_truncated_and_overlong_rows_follow_their_policies(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [a_row(id="good"), a_row(id="cut", truncated=True), a_row(n=30, id="long")]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    kept = TrajectoryDataset.open(prepare(config(file, overlong="drop")))
    assert [t.id for t in kept] == ["good"]
    assert "kept 1 trajectories; dropped 1 marked truncated" in caplog.text
    assert "1 longer than data.seq_length" in caplog.text

    all_kept = TrajectoryDataset.open(prepare(config(file, truncated="keep", seq_length=29)))
    assert [t.id for t in all_kept] == ["good", "cut", "long"]

    caught = refused(config(file, truncated="error"))
    assert f"{file}:2: truncated = True" in str(caught)
    assert f"{file}:3: input_ids has 30 tokens" in str(caught)


def test_nothing_left_is_an_error(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [a_row(truncated=True)])
    with pytest.raises(DataError, match="no trajectory is left: dropped 1 marked truncated"):
        prepare(config(file))


def test_plain_sft_needs_no_log_probs_and_no_temperature(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [a_row(behavior_logprobs=None), a_row(temperature=0.7)])
    dataset = TrajectoryDataset.open(prepare(config(file), require_behavior_logprobs=False))
    assert not dataset[0].behavior_logprobs.any()


def test_log_probs_rounded_to_half_precision_are_warned_about(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    nats = 10.0 ** np.random.default_rng(0).uniform(-7, 0, 40)  # most tokens are nearly certain
    exact = -nats.astype(np.float32)
    kinds = {
        "float32": exact,
        "float16": exact.astype(np.float16),
        "bfloat16": (exact.view(np.uint32) & 0xFFFF0000).view(np.float32),
    }
    for name, values in kinds.items():
        row = a_row(n=41, prompt=1, behavior_logprobs=[None, *values.tolist()])
        prepare(config(write_jsonl(tmp_path / f"{name}.jsonl", [row]), seq_length=64))
        assert ("look rounded to float16 or bfloat16" in caplog.text) == (name != "float32")
        caplog.clear()


def test_zero_log_probs_are_plausible_on_a_short_answer(tmp_path: Path, config: Config) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [a_row(n=5, prompt=2, behavior_logprobs=[0.0] * 5)])
    assert len(TrajectoryDataset.open(prepare(config(file)))) == 1
