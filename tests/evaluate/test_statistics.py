"""pass@k is the chance it says it is, and intervals cover as often as they say."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the extra eval")

from pear_megatron.evaluate.statistics import holm, interval, over_runs, p_value, pass_at_k

SHARE = (0.0, 1.0)


def test_pass_at_k_is_the_share_of_k_subsets_that_hold_a_right_sample() -> None:
    n = 6
    for right in range(n + 1):
        samples = [i < right for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(samples, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, np.array([right]), k)[0] == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_pass_at_k_is_unbiased(k: int) -> None:
    n, p = 8, 0.13
    chances = np.array([comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])
    assert chances @ pass_at_k(n, np.arange(n + 1), k) == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_pass_at_k_of_thousands_of_samples_neither_overflows_nor_cancels() -> None:
    n, right, k = 5000, 3, 1000
    exact = 1 - comb(n - right, k) / comb(n, k)
    assert pass_at_k(n, np.array([right]), k)[0] == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("right", "k"), [(1, 0), (1, 9), (9, 1), (-1, 1)])
def test_pass_at_k_refuses_what_cannot_be(right: int, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(8, np.array([right]), k)


def _coverage(draw, truth: float, bounds: tuple[float, float], count: int) -> float:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(count):
        e = interval(draw(rng), bounds=bounds)
        inside += e.low <= truth <= e.high
    return inside / count


def test_intervals_over_problems_cover_nineteen_times_in_twenty() -> None:
    def draw(rng: np.random.Generator) -> np.ndarray:  # pass@1 of skewed difficulties, 4 samples each
        return rng.binomial(4, rng.beta(0.3, 1.5, size=80)) / 4

    assert 0.91 <= _coverage(draw, 0.3 / 1.8, SHARE, 150) <= 0.985


def test_paired_intervals_cover_the_difference_of_two_checkpoints() -> None:
    def draw(rng: np.random.Generator) -> np.ndarray:
        easy = rng.beta(1.0, 2.0, size=80)
        return (rng.binomial(4, 0.9 * easy) - rng.binomial(4, easy)) / 4

    assert 0.91 <= _coverage(draw, -0.1 / 3, (-1.0, 1.0), 150) <= 0.985


@pytest.mark.parametrize(("runs_sd", "problems_sd"), [(0.1, 0.05), (0.02, 0.3), (0.0, 0.0)])
def test_intervals_over_three_runs_cover_runs_and_problems(runs_sd: float, problems_sd: float) -> None:
    def draw(rng: np.random.Generator) -> np.ndarray:
        runs = rng.normal(0, runs_sd, size=(3, 1))
        problems = rng.normal(0, problems_sd, size=(1, 50))
        return 0.5 + runs + problems + rng.normal(0, 0.2, size=(3, 50))

    assert 0.925 <= _coverage(draw, 0.5, (-9.0, 9.0), 1000) <= 0.995


def test_nothing_solved_is_not_certainty() -> None:
    e = interval(np.zeros(300), bounds=SHARE)
    assert (e.mean, e.low) == (0.0, 0.0)
    assert e.high == pytest.approx(0.01222, abs=1e-4)  # Clopper and Pearson's for 0 of 300


def test_runs_that_solve_nothing_alike_are_not_certainty_either() -> None:
    e = interval(np.zeros((3, 50)), bounds=SHARE)
    assert e.high > 0.05


def test_everything_solved_is_not_certainty_and_neither_is_no_difference() -> None:
    every = interval(np.ones(300), bounds=SHARE)
    assert (every.mean, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(1 - 0.01222, abs=1e-4)
    no_difference = interval(np.zeros(300), bounds=(-1.0, 1.0))
    assert no_difference.low == -no_difference.high == pytest.approx(-0.01222, abs=1e-4)


def test_the_interval_is_reproducible_and_of_many_problems_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(size=1000)
    e = interval(values, bounds=(-9, 9))
    assert e == interval(values, bounds=(-9, 9))
    reach = 1.96 * values.std() / np.sqrt(1000)
    assert e.high - e.mean == pytest.approx(reach, rel=0.06)
    assert e.mean - e.low == pytest.approx(reach, rel=0.06)


def test_the_interval_of_one_number_a_run_is_students() -> None:
    e = over_runs(np.array([1.0, 2.0, 4.0, 5.0]), bounds=(-99.0, 99.0))
    half = 3.182446305 * np.sqrt(10 / 3) / 2  # t of 3 degrees of freedom times s / sqrt(4)
    assert (e.mean, e.low, e.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    narrow = over_runs(np.array([1.0, 2.0, 4.0, 5.0]), bounds=(1.0, 5.0))
    assert (narrow.low, narrow.high) == (1.0, 5.0)
    assert over_runs(np.array([2.0, 2.0]), bounds=(0.0, 9.0)).low == 2.0


def test_one_run_says_nothing_about_runs() -> None:
    e = over_runs(np.array([3.0]), bounds=(1.0, 120.0))
    assert (e.mean, e.low, e.high) == (3.0, 1.0, 120.0)


@pytest.mark.parametrize("runs", [2, 3, 8])
def test_intervals_over_runs_cover_nineteen_times_in_twenty(runs: int) -> None:
    rng = np.random.default_rng(3)
    draws = rng.normal(0.4, 0.1, size=(4000, runs))
    estimates = [over_runs(draw, bounds=(-9.0, 9.0)) for draw in draws]
    covered = np.mean([e.low <= 0.4 <= e.high for e in estimates])
    assert covered == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 4000))


@pytest.mark.parametrize("shape", [(5,), (5, 40), (2, 3)])
def test_the_p_value_is_where_the_interval_would_touch_zero(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).normal(0.3, 0.5, shape)
    interval_of = over_runs if values.ndim == 1 else interval
    found = interval_of(values, bounds=(-99.0, 99.0))
    for end in (found.low, found.high):
        assert p_value(values - end) == pytest.approx(0.05)


def test_the_p_value_of_one_number_a_run_is_students() -> None:
    values = np.random.default_rng(2).normal(0.2, 1.0, 6)
    import scipy.stats

    assert p_value(values) == pytest.approx(scipy.stats.ttest_1samp(values, 0.0).pvalue)


def test_runs_that_all_agree_are_no_certainty() -> None:
    """Two seeds that take off five steps earlier each: chance does that every second time."""
    assert p_value(np.zeros(4)) == 1.0
    assert p_value(np.full(2, -5.0)) == 0.5
    assert p_value(np.full((4, 3), 0.5)) == 0.125


def test_of_counted_steps_at_most_one_difference_in_twenty_is_clear() -> None:
    rng = np.random.default_rng(0)
    differences = rng.poisson(3, (2000, 2)) - rng.poisson(3, (2000, 2))
    assert np.mean([p_value(pair) < 0.05 for pair in differences.astype(float)]) < 0.05


def test_holm_corrects_step_down_and_keeps_the_order() -> None:
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9, 0.001]) == pytest.approx([1.0, 1.0, 0.003])
    assert holm([]) == []
