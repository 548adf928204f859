"""The report of the stretches world: pass@k, intervals and pictures."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from examples.stretches import world
from examples.stretches.estimates import Estimate, bootstrap_interval, pass_at_k, score_answers, summarize


@pytest.mark.parametrize("n", [1, 4, 8])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(n: int) -> None:
    for right in range(n + 1):
        samples = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(samples, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, np.array([right]), k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_holds_for_many_samples_and_refuses_too_few() -> None:
    assert pass_at_k(10_000, np.array([1]), 5_000)[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="pass@9"):
        pass_at_k(8, np.array([1]), 9)
    with pytest.raises(ValueError, match="between 0 and all"):
        pass_at_k(8, np.array([9]), 8)


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        estimate = bootstrap_interval(rng.beta(2, 5, size=80), resamples=600, seed=i)
        hits += estimate.low <= 2 / 7 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.985


def test_the_interval_is_reproducible_and_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(size=3000)
    estimate = bootstrap_interval(values, bounds=(-9, 9))
    assert estimate == bootstrap_interval(values, bounds=(-9, 9))
    reach = 1.96 * values.std() / np.sqrt(3000)
    assert estimate.high - estimate.mean == pytest.approx(reach, rel=0.05)
    assert estimate.mean - estimate.low == pytest.approx(reach, rel=0.05)


def test_no_problem_solved_is_not_certainty() -> None:
    none = bootstrap_interval(np.zeros(300))
    assert (none.mean, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 300))
    every = bootstrap_interval(np.ones(300))
    assert (every.mean, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(1 - none.high)
    no_difference = bootstrap_interval(np.zeros(300), bounds=(-1.0, 1.0))
    assert no_difference.low == -no_difference.high == -none.high


def test_answers_are_scored_by_problem() -> None:
    rng = np.random.default_rng(2)
    prompts = world.sample_problems(rng, 3)
    careful = world.sample_answers(rng, prompts, 1 - 1e-12).responses
    coarse = world.sample_answers(rng, prompts, 1e-12).responses
    wrong = coarse.copy()
    wrong[:, 7] = (wrong[:, 7] + 1) % world.MODULUS
    responses = np.stack([careful, wrong, wrong, wrong], axis=1)
    responses[2, 0] = wrong[2]
    scores = score_answers(prompts, responses)
    assert scores["pass@1"].tolist() == [0.25, 0.25, 0.0]
    assert scores["pass@4"].tolist() == [1.0, 1.0, 0.0]
    assert scores["careful_share"].tolist() == [0.25, 0.25, 0.0]
    summary = summarize(prompts, responses)
    assert summary["pass@1"].mean == pytest.approx(1 / 6)


def test_pictures_are_written_and_small(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    from examples.stretches import plots

    rng = np.random.default_rng(0)
    weights = {"SFT": np.ones((3, 33)), "PEAR token": rng.uniform(0.1, 1.0, (3, 33))}
    careful = rng.random((3, 4)) < 0.5
    in_careful = np.pad(np.repeat(careful, 8, axis=1), ((0, 0), (0, 1)))
    results = {
        arm: {"pass@1": Estimate(0.0, 0.0, 0.012), "pass@8": Estimate(0.1, 0.05, 0.2)} for arm in weights
    }
    plots.plot_weights_over_positions(
        tmp_path / "a.png", weights, careful, stretch_length=8, names=["x", "y", "z"]
    )
    plots.plot_weight_distributions(tmp_path / "b.png", weights, careful=in_careful)
    plots.plot_results(tmp_path / "new" / "c.png", results)
    for path in (tmp_path / "a.png", tmp_path / "b.png", tmp_path / "new" / "c.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.stat().st_size < 150_000
    with pytest.raises(ValueError, match="SFT is the same"):
        plots.plot_weight_distributions(tmp_path / "d.png", {"SFT": np.ones(5)})
