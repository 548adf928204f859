"""A packed batch keeps trajectories apart, shifts once, and is the same under every layout."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pear_megatron.data import BatchPlan, PackedBatch, Trajectory, collate, micro_batches


def make(index: int, n: int, prompt: int = 1) -> Trajectory:
    """Token i of trajectory k is 1000 k + i, its log-prob -(k + i / 100): every number tells its origin."""
    mask = np.arange(n) >= prompt
    return Trajectory(
        str(index),
        (1000 * index + np.arange(n)).astype(np.int32),
        mask,
        np.where(mask, -(index + np.arange(n) / 100), 0).astype(np.float32),
        reward=float(index),
    )


def test_hand_made_batch() -> None:
    trajectories = [make(0, 4, prompt=2), make(1, 3)]
    batch = collate(trajectories, [[1, 0], []], seq_length=7)
    none = -100
    assert batch.tokens.tolist() == [[1000, 1001, 0, 1, 2, 0, 0], [0] * 7]
    assert batch.labels.tolist() == [[1001, 1002, none, 2, 3, none, none], [none] * 7]
    assert batch.loss_mask.int().tolist() == [[1, 1, 0, 1, 1, 0, 0], [0] * 7]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    expected = torch.tensor([-1.01, -1.02, 0, -0.02, -0.03, 0, 0])
    torch.testing.assert_close(batch.behavior_logprobs[0], expected)
    assert not batch.behavior_logprobs[1].any()
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 7, 14]
    assert batch.reward.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert batch.trajectory_index.tolist() == [1, 0, -1, -1]
    assert batch.max_seqlen == 7


def test_dtypes_are_those_megatron_takes() -> None:
    batch = collate([make(0, 4)], [[0]], seq_length=4)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.position_ids.dtype) == (torch.int64,) * 3
    assert (batch.loss_mask.dtype, batch.behavior_logprobs.dtype) == (torch.bool, torch.float32)
    assert (batch.cu_seqlens.dtype, batch.reward.dtype) == (torch.int32, torch.float32)
    assert batch.trajectory_index.dtype == torch.int64


def test_a_full_row_has_no_padding_segment() -> None:
    batch = collate([make(0, 4), make(1, 3)], [[0, 1]], seq_length=5)
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.trajectory_index.tolist() == [0, 1]


def test_a_row_too_full_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"row \[0, 1\] takes more than seq_length = 4"):
        collate([make(0, 4), make(1, 3)], [[0, 1]], seq_length=4)


def segments_of(batch: PackedBatch) -> list[slice]:
    ends = batch.cu_seqlens.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def test_attention_never_leaves_its_trajectory_or_looks_ahead() -> None:
    batch = collate([make(0, 4), make(1, 3)], [[1, 0], [0], []], seq_length=7)
    masked_out = batch.attention_mask()
    assert masked_out.shape == (3, 1, 7, 7)
    assert masked_out.dtype == torch.bool
    expected = torch.ones(21, 21, dtype=torch.bool)
    for part in segments_of(batch):
        expected[part, part] = torch.ones_like(expected[part, part]).triu(1)
    for row in range(3):
        here = slice(7 * row, 7 * row + 7)
        assert torch.equal(masked_out[row, 0], expected[here, here])


def test_no_position_attends_to_nothing() -> None:
    masked_out = collate([make(0, 4)], [[0], []], seq_length=6).attention_mask()
    assert not masked_out.diagonal(dim1=-2, dim2=-1).any()


@given(st.lists(st.integers(2, 17), min_size=1, max_size=40), st.integers(0, 2**31))
def test_packing_never_mixes_trajectories(lengths: list[int], seed: int) -> None:
    trajectories = [make(k, n) for k, n in enumerate(lengths)]
    plan = BatchPlan(lengths, 16, 4, seed=seed)
    seen = []
    for step in range(plan.steps_per_epoch()):
        (batch,) = micro_batches(trajectories, plan, step, dp_rank=0, dp_size=1, micro_batch_size=4)
        assert batch.cu_seqlens[-1] == batch.tokens.numel()
        for part, index in zip(segments_of(batch), batch.trajectory_index.tolist(), strict=True):
            assert part.start // 16 == (part.stop - 1) // 16  # a segment stays within its row
            positions = batch.position_ids.flatten()[part]
            assert positions.tolist() == list(range(len(positions)))
            mask = batch.loss_mask.flatten()[part]
            if index < 0:
                assert not mask.any()
                continue
            seen.append(index)
            whole = trajectories[index]
            assert batch.tokens.flatten()[part].tolist() == whole.input_ids[:-1].tolist()
            assert (
                batch.labels.flatten()[part][mask].tolist()
                == whole.input_ids[1:][whole.loss_mask[1:]].tolist()
            )
            behavior = batch.behavior_logprobs.flatten()[part]
            assert behavior.tolist() == whole.behavior_logprobs[1:].tolist()
    assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize(
    ("dp_size", "micro_batch_size"), [(1, 1), (1, 8), (2, 1), (2, 2), (2, 4), (4, 2), (8, 1)]
)
def test_every_layout_sees_the_same_rows(dp_size: int, micro_batch_size: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 18, size=100).tolist()
    trajectories = [make(k, n) for k, n in enumerate(lengths)]
    plan = BatchPlan(lengths, 16, 8, seed=1)
    for step in (0, plan.steps_per_epoch() - 1):
        (whole,) = micro_batches(trajectories, plan, step, dp_rank=0, dp_size=1, micro_batch_size=8)
        parts = [
            batch
            for rank in range(dp_size)
            for batch in micro_batches(
                trajectories, plan, step, dp_rank=rank, dp_size=dp_size, micro_batch_size=micro_batch_size
            )
        ]
        assert len(parts) * micro_batch_size == 8
        assert all(batch.tokens.shape == (micro_batch_size, 16) for batch in parts)
        rows = sorted(row for batch in parts for row in batch.labels.tolist())
        assert rows == sorted(whole.labels.tolist())
        assert sum(int(batch.loss_mask.sum()) for batch in parts) == int(whole.loss_mask.sum())


def test_resume_at_a_step_gives_the_same_batches() -> None:
    lengths = np.random.default_rng(0).integers(2, 18, size=60).tolist()
    trajectories = [make(k, n) for k, n in enumerate(lengths)]

    def batches(plan: BatchPlan, steps: range) -> list[PackedBatch]:
        layout = {"dp_rank": 1, "dp_size": 2, "micro_batch_size": 2}
        return [b for step in steps for b in micro_batches(trajectories, plan, step, **layout)]

    straight = batches(BatchPlan(lengths, 16, 4, seed=1), range(30))
    resumed = batches(BatchPlan(lengths, 16, 4, seed=1), range(17, 30))
    for one, other in zip(straight[17:], resumed, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.cu_seqlens, other.cu_seqlens)
        assert torch.equal(one.behavior_logprobs, other.behavior_logprobs)


def test_batch_size_that_does_not_divide_names_the_fields() -> None:
    plan = BatchPlan([5] * 9, 16, 6, seed=1)
    expected = (
        r"global_batch_size = 6 is not divisible by 4 = 2 data-parallel ranks x train.micro_batch_size = 2"
    )
    with pytest.raises(ValueError, match=expected):
        micro_batches([], plan, 0, dp_rank=0, dp_size=2, micro_batch_size=2)


def test_batch_moves_to_a_device() -> None:
    batch = collate([make(0, 4)], [[0]], seq_length=4).to("meta")
    assert batch.tokens.device.type == "meta"
    assert batch.max_seqlen == 3


def test_arrays_of_another_length_are_named() -> None:
    row = make(0, 5)
    short = replace(row, behavior_logprobs=row.behavior_logprobs[1:])
    with pytest.raises(
        ValueError, match="behavior_logprobs has 4 entries and input_ids 5; give one per token"
    ):
        collate([short], [[0]], 8)
