"""Numbers for a report: pass@k, the careful share, and bootstrap intervals over the problems."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.stretches import world


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def pass_at_k(num_samples: np.ndarray | int, num_right: np.ndarray, k: int) -> np.ndarray:
    """Unbiased pass@k of each problem: 1 - C(n - c, k) / C(n, k), for c of n samples right.

    The chance that k of the n samples, drawn without replacement, contain a right one (Chen et al. 2021,
    arXiv 2107.03374). Multiplied out term by term: binomials of large n would overflow.
    """
    n, c = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_right))
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} needs 1 <= k <= the samples of every problem, here {n.min()}")
    if ((c < 0) | (c > n)).any():
        raise ValueError("the right samples of a problem must be between 0 and all of its samples")
    all_wrong = np.ones(n.shape)
    for i in range(k):
        all_wrong *= np.maximum(n - c - i, 0) / (n - i)
    return 1.0 - all_wrong


def bootstrap_interval(
    per_problem: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Mean of per_problem [P] with its percentile bootstrap interval over the problems.

    Problems are resampled, not answers: answers to one problem are not independent. Where all problems agree
    the bootstrap would claim certainty (0 of 300 solved: [0, 0]). The interval then allows for the largest
    share of problems, taking any value within ``bounds``, that could have stayed unseen: that share is
    1 - (alpha / 2)^(1 / P), as in Clopper and Pearson's interval.

    Give the differences of two arms on the same problems, and bounds=(-1, 1), for a paired comparison.
    """
    values = np.asarray(per_problem, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"per_problem must be [P] with P >= 1, got shape {values.shape}")
    mean, tail = float(values.mean()), (1.0 - confidence) / 2.0
    if np.ptp(values) == 0.0:
        unseen = 1.0 - tail ** (1.0 / len(values))
        low, high = (mean + unseen * (bound - mean) for bound in bounds)
        return Estimate(mean, low, high)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, 4_000_000 // len(values))
    for i in range(0, resamples, chunk):
        picks = rng.integers(len(values), size=(min(chunk, resamples - i), len(values)))
        means[i : i + chunk] = values[picks].mean(axis=1)
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Estimate(mean, float(low), float(high))


def score_answers(prompts: np.ndarray, responses: np.ndarray) -> dict[str, np.ndarray]:
    """Per problem, from K sampled answers each: ``pass@1``, ``pass@K`` and ``careful_share``, all [P].

    Args:
        prompts: [P, 33].
        responses: [P, K, 33].
    """
    num_samples = responses.shape[1]
    num_right = world.verify(prompts[:, None], responses).sum(axis=1)
    return {
        "pass@1": pass_at_k(num_samples, num_right, 1),
        f"pass@{num_samples}": pass_at_k(num_samples, num_right, num_samples),
        "careful_share": world.careful_stretches(responses).mean(axis=(1, 2)),
    }


def summarize(prompts: np.ndarray, responses: np.ndarray, *, seed: int = 0) -> dict[str, Estimate]:
    """score_answers, averaged over the problems, with 95 % intervals."""
    scores = score_answers(prompts, responses)
    return {name: bootstrap_interval(values, seed=seed) for name, values in scores.items()}
