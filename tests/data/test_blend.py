"""Blends: each source in its share, every pass whole, and nothing but the seed and the step decides."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pear_megatron.data import BatchPlan, DataConfig, TrajectoryDataset, prepare
from pear_megatron.data.blend import Blend, TrajectoryBlend
from tests.megatron.runs import write_trajectories

RNG = np.random.default_rng(0)
LENGTHS = [RNG.integers(4, 12, 50), RNG.integers(20, 30, 10), RNG.integers(8, 9, 200)]
OFFSETS = np.cumsum([0, *map(len, LENGTHS)])
ALL = np.concatenate(LENGTHS)


def plan(weights: list[float] | None = None, by: str = "trajectories", seed: int = 3) -> BatchPlan:
    blend = None if weights is None else Blend.of(weights, LENGTHS, by=by)
    return BatchPlan(ALL, 64, 4, seed=seed, blend=blend)


def seen(plan: BatchPlan, steps: range) -> np.ndarray:
    return np.array([i for step in steps for row in plan.rows(step)[1] for i in row])


def counts(indices: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(OFFSETS, indices, side="right") - 1, minlength=3)


@pytest.mark.parametrize("by", ["trajectories", "tokens"])
def test_epochs_hold_the_shares_of_the_weights(by: str) -> None:
    blend = plan([1, 2, 1], by)
    indices = seen(blend, range(blend.first_step(3)))
    size = np.ones(len(ALL)) if by == "trajectories" else ALL
    of_source = np.searchsorted(OFFSETS, indices, side="right") - 1
    share = np.bincount(of_source, weights=size[indices], minlength=3)
    assert share / share.sum() == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    assert share.sum() == pytest.approx(3 * size.sum(), rel=0.01)  # an epoch is as much as there is


def test_a_pass_over_a_source_is_whole_before_the_next_begins() -> None:
    blend = plan([1, 2, 1])
    indices = seen(blend, range(blend.first_step(4)))
    times = np.bincount(indices, minlength=len(ALL))
    for start, end in itertools.pairwise(OFFSETS):
        assert np.ptp(times[start:end]) <= 1
    assert times[OFFSETS[1] : OFFSETS[2]].min() >= 51  # 130 of 10, four times


def test_batches_follow_from_seed_and_step_alone() -> None:
    walked = plan([1, 2, 1], "tokens")
    batches = [walked.rows(step) for step in range(60)]
    for step in (59, 0, 31, 17):
        assert plan([1, 2, 1], "tokens").rows(step) == batches[step]
    assert plan([1, 2, 1], "tokens", seed=4).rows(0) != batches[0]
    assert plan([2, 4, 2], "tokens").rows(5) == batches[5]  # shares, whatever they sum to


def test_epochs_differ_and_packing_is_as_ever() -> None:
    blend = plan([1, 2, 1])
    assert blend.rows(0)[1] != blend.rows(blend.first_step(1))[1]
    for step in range(blend.first_step(2)):
        for row in blend.rows(step)[1]:
            assert sum(ALL[i] - 1 for i in row) <= 64


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 1.0]])
def test_drawn_counts_what_the_steps_before_held(weights: list[float] | None) -> None:
    steps = range(plan(weights).first_step(2) + 3)
    walked, asked = plan(weights), plan(weights)
    for step in (0, 1, steps[-1], 7, walked.first_step(1)):
        expected = counts(seen(walked, range(step))) if step else np.zeros(3)
        assert asked.drawn(step, OFFSETS).tolist() == expected.tolist(), step


def test_joined_sources_are_their_files_one_after_the_other(tmp_path: Path) -> None:
    """So that sources without weights train as the files alone do, bit for bit."""
    files = [write_trajectories(tmp_path / f"{i}.jsonl", 7 + i, seed=i) for i in range(3)]
    for file in files:
        file.write_text(file.read_text().replace("trajectory-", f"{file.stem}-"))
    config = {"seq_length": 64, "cache_dir": str(tmp_path / "cache")}

    def open_files(*names: Path) -> TrajectoryDataset:
        return TrajectoryDataset.open(prepare(DataConfig(train=[str(n) for n in names], **config)))

    whole, blend = open_files(*files), TrajectoryBlend([open_files(file) for file in files], "abc")
    assert len(blend) == len(whole) == 24
    for name in ("lengths", "num_decisions", "rewards"):
        assert np.array_equal(getattr(blend, name), getattr(whole, name))
    assert blend.meta["files"] == whole.meta["files"]
    assert [t.source for t in blend] == [0] * 7 + [1] * 8 + [2] * 9
    for a, b in zip(blend, whole, strict=True):
        assert a.id == b.id
        assert np.array_equal(a.input_ids, b.input_ids)
    other = TrajectoryBlend([open_files(files[i]) for i in (0, 2, 1)], "acb")
    assert other.fingerprint() != blend.fingerprint()
    with pytest.raises(IndexError, match="24 of 24"):
        blend[24]


def test_one_string_and_one_source_will_do() -> None:
    assert DataConfig(train="a.jsonl", seq_length=8).train == ["a.jsonl"]
    (source,) = DataConfig(train={"path": "a.jsonl", "name": "a"}, seq_length=8).train_sources
    assert source.path == ["a.jsonl"]
    config = DataConfig(
        train=[{"path": ["a", "b"], "name": "x", "weight": 2}, {"path": "c", "name": "y", "weight": 1}],
        seq_length=8,
    )
    assert config.train_files == ["a", "b", "c"]
    assert DataConfig.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": ["a", {"path": "b", "name": "b"}]}, "a list of files and sources mixed"),
        ({"train": [{"path": "a", "name": "x"}, {"path": "b", "name": "x"}]}, "two sources are named 'x'"),
        (
            {"train": [{"path": "a", "name": "x", "weight": 1}, {"path": "b", "name": "y"}]},
            "some sources have a weight and some have none",
        ),
        ({"train": [{"path": "a", "name": "x", "weight": 0}]}, "greater than 0"),
        ({"train": [{"path": "a", "name": "x", "wieght": 1}]}, "did you mean 'weight'"),
        ({"train": [{"path": "a", "name": "x/y"}]}, "should match pattern"),
        ({"train": [{"path": "a"}]}, "name"),
        ({"train": []}, "at least 1"),
        ({"train": ["a"], "blend_by": "tokens"}, "no source has one"),
        (
            {"train": ["a"], "validation": [{"path": "b", "name": "b", "weight": 1}]},
            "every held-out trajectory counts once",
        ),
    ],
)
def test_mistakes_are_named(values: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DataConfig.model_validate({"seq_length": 8, **values})
