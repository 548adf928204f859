"""Every trajectory is seen once an epoch, in an order that depends on the seed and the step alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_megatron.data import BatchPlan, plan_epoch

LENGTHS = np.random.default_rng(0).integers(2, 34, size=500)
lists_of_lengths = st.lists(st.integers(2, 33), min_size=1, max_size=400)


@given(lists_of_lengths, st.integers(0, 2**32), st.integers(0, 5), st.booleans())
def test_every_trajectory_is_in_exactly_one_row_that_holds_it(
    lengths: list[int], seed: int, epoch: int, packing: bool
) -> None:
    rows = plan_epoch(lengths, 32, seed=seed, epoch=epoch, packing=packing)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] - 1 for i in row) <= 32 for row in rows)
    assert all(rows)
    if not packing:
        assert all(len(row) == 1 for row in rows)


@given(lists_of_lengths, st.integers(0, 2**32))
def test_at_most_one_row_is_half_empty(lengths: list[int], seed: int) -> None:
    rows = plan_epoch(lengths, 32, seed=seed, epoch=0)
    assert sum(sum(lengths[i] - 1 for i in row) < 16 for row in rows) <= 1


def test_packing_leaves_little_room() -> None:
    lengths = np.random.default_rng(1).integers(50, 1000, size=5000)
    rows = plan_epoch(lengths, 2048, seed=0, epoch=0)
    assert (lengths - 1).sum() / (len(rows) * 2048) > 0.95


def test_order_changes_with_seed_and_epoch_and_with_nothing_else() -> None:
    plans = [plan_epoch(LENGTHS, 64, seed=s, epoch=e) for s, e in [(1, 0), (1, 1), (2, 0), (1, 0)]]
    assert plans[0] == plans[3]
    assert plans[0] != plans[1]
    assert plans[0] != plans[2]


def test_the_order_is_the_same_on_every_machine() -> None:
    assert plan_epoch([5, 9, 3, 7, 4, 8], 10, seed=3, epoch=2) == [[4, 0], [1, 2], [3], [5]]


def test_trajectory_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="trajectory 1 takes 20 positions, a row has seq_length = 16"):
        plan_epoch([17, 21], 16, seed=0, epoch=0)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_of_batches_is_every_trajectory_once(packing: bool) -> None:
    plan = BatchPlan(LENGTHS, 64, 16, seed=5, packing=packing)
    for epoch in range(3):
        steps = range(plan.first_step(epoch), plan.first_step(epoch + 1))
        assert len(steps) == plan.steps_per_epoch(epoch)
        batches = [plan.rows(step) for step in steps]
        assert {e for e, _ in batches} == {epoch}
        assert all(len(rows) == 16 for _, rows in batches)
        seen = sorted(i for _, rows in batches for row in rows for i in row)
        assert seen == list(range(len(LENGTHS)))


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    walked = BatchPlan(LENGTHS, 64, 16, seed=5)
    batches = [walked.rows(step) for step in range(60)]
    assert batches[-1][0] >= 2
    for step in (59, 0, 31):
        assert BatchPlan(LENGTHS, 64, 16, seed=5).rows(step) == batches[step]
        assert walked.rows(step) == batches[step]


def test_batch_larger_than_the_data_is_filled_with_empty_rows() -> None:
    plan = BatchPlan([5, 5, 5], 8, 8, seed=0, packing=False)
    assert plan.steps_per_epoch() == 1
    epoch, rows = plan.rows(2)
    assert epoch == 2
    assert sorted(rows) == [[], [], [], [], [], [0], [1], [2]]


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="no trajectories"):
        BatchPlan([], 8, 8, seed=0)
    with pytest.raises(ValueError, match="global_batch_size = 0"):
        BatchPlan([5], 8, 0, seed=0)
    with pytest.raises(ValueError, match="step = -1"):
        BatchPlan([5], 8, 8, seed=0).rows(-1)
