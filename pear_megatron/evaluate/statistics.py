"""pass@k, and confidence intervals of means over problems and over runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pear_megatron.errors import EvalError

_RESAMPLES = 9999
_TAIL = 0.025  # beyond each end of a 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def pass_at_k(num_samples: int, num_right: np.ndarray, k: int) -> np.ndarray:
    """Unbiased pass@k of each problem: 1 - C(n - c, k) / C(n, k) where c of n samples are right.

    That is the chance that k of the n samples, drawn without replacement, hold a right one (Chen et al. 2021,
    arXiv 2107.03374). Its mean over problems is an unbiased estimate of pass@k for every k <= n.

    Raises:
        ValueError: k or a count is out of range.
    """
    right = np.asarray(num_right)
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= {num_samples}, the samples of each problem")
    if ((right < 0) | (right > num_samples)).any():
        raise ValueError(f"right samples must be between 0 and {num_samples}")
    all_wrong = np.ones(right.shape)
    for i in range(k):  # a product of k factors in [0, 1]: the binomials themselves overflow
        all_wrong *= np.maximum(num_samples - right - i, 0) / (num_samples - i)
    return 1.0 - all_wrong


def interval(values: np.ndarray, *, bounds: tuple[float, float]) -> Estimate:
    """The mean of ``values`` and its 95 % confidence interval.

    One run: the bias-corrected and accelerated bootstrap over problems (samples of one problem are not
    independent of each other, problems are). Several runs: both runs and problems are drawn from a larger
    population, and the interval is Student's, with the variances of runs, problems and their interaction from
    a two-way analysis of variance (Satterthwaite's degrees of freedom): a bootstrap over three runs would
    cover only three times in four.

    Give the differences of two checkpoints on the same problems for a paired comparison.

    Args:
        values: [P], one a problem, or [R, P], a row a run.
        bounds: what a value can be at least and at most.

    Raises:
        ValueError: there are no values.
        EvalError: scipy is missing.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if not values.size:
        raise ValueError("an interval needs at least one value")
    mean = float(values.mean())
    if np.ptp(values.mean(axis=0)) == 0.0:
        low, high = _all_agree(mean, values.shape[1], bounds)
        if len(values) > 1:
            more = _over_runs_and_problems(values)
            low, high = min(low, more[0]), max(high, more[1])
    elif len(values) == 1:
        low, high = _over_problems(values[0])
    else:
        low, high = _over_runs_and_problems(values)
    return Estimate(mean, max(low, bounds[0]), min(high, bounds[1]))


def over_runs(values: np.ndarray, *, bounds: tuple[float, float]) -> Estimate:
    """The mean of one number a run [R] and its Student's interval, in the ``bounds`` of a value.

    Of a single run the interval is all of ``bounds``.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, *bounds)
    low, high = _over_runs_and_problems(values[:, None])
    return Estimate(mean, max(low, bounds[0]), min(high, bounds[1]))


def p_value(values: np.ndarray) -> float:
    """Two-sided p-value of a mean of 0 over several runs, of the test that ``interval`` and ``over_runs`` invert.

    Where all runs agree, so that their scatter is unknown, the sign test's: 2^(1 - R), or 1 where they agree on 0.

    Args:
        values: [R], one a run, or [R, P], a row a run and a column a problem; R >= 2.
    """
    values = np.asarray(values, dtype=np.float64)
    error, degrees = _standard_error(values if values.ndim == 2 else values[:, None])
    if error == 0.0:
        return 2.0 ** (1 - len(values)) if values.mean() else 1.0
    return float(2.0 * _scipy_stats().t.sf(abs(values.mean()) / error, degrees))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are: step-down Bonferroni (Holm 1979); in the order given."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1.0)
    return adjusted[np.argsort(order, kind="stable")].tolist()


def _all_agree(mean: float, count: int, bounds: tuple[float, float]) -> tuple[float, float]:
    """Where all problems agree the bootstrap would claim certainty (0 of 300 solved: [0, 0]).

    A share 1 - 0.025^(1/P) of all problems could have stayed unseen, with any value in the bounds: for values
    of 0 and 1 this is Clopper and Pearson's interval.
    """
    unseen = 1.0 - _TAIL ** (1.0 / count)
    return tuple(mean + unseen * (bound - mean) for bound in bounds)  # type: ignore[return-value]


def _over_problems(values: np.ndarray) -> tuple[float, float]:
    result = _scipy_stats().bootstrap(
        (values,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=max(1, 4_000_000 // len(values)),
        confidence_level=1.0 - 2.0 * _TAIL,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _over_runs_and_problems(values: np.ndarray) -> tuple[float, float]:
    error, degrees = _standard_error(values)
    half = error * _scipy_stats().t.ppf(1.0 - _TAIL, degrees) if error else 0.0
    return float(values.mean() - half), float(values.mean() + half)


def _standard_error(values: np.ndarray) -> tuple[float, float]:
    """Of the mean of ``values`` [R, P], R >= 2, and its degrees of freedom."""
    runs, problems = values.shape
    mean, by_run, by_problem = values.mean(), values.mean(axis=1), values.mean(axis=0)
    # Mean squares; each estimates the interaction's variance plus that of its own factor.
    of_runs = problems * by_run.var(ddof=1)
    of_problems = runs * by_problem.var(ddof=1) if problems > 1 else 0.0
    freedom = (runs - 1) * max(problems - 1, 1)
    rest = ((values - by_run[:, None] - by_problem + mean) ** 2).sum() / freedom
    square = max(of_runs + of_problems - rest, of_runs, of_problems)
    if square == 0.0:
        return 0.0, 1.0
    parts = ((of_runs, runs - 1), (of_problems, problems - 1), (rest, freedom))
    degrees = square**2 / sum(part**2 / n for part, n in parts if n)
    return float(np.sqrt(square / (runs * problems))), float(degrees)


def _scipy_stats():  # type: ignore[no-untyped-def]
    try:
        import scipy.stats
    except ImportError as error:
        raise EvalError("intervals need scipy; pip install 'pear-megatron[eval]'") from error
    return scipy.stats
