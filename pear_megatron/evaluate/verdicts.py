"""What an evaluation's numbers say, and what they do not, each with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pear_megatron.evaluate.paired import Comparison
from pear_megatron.evaluate.results import Results
from pear_megatron.pages.page import Verdict, in_order

_MANY_CUT, _FEW_CUT = 0.2, 0.02  # shares of responses
_FEW_MIXED = 0.1  # share of problems
_WIDE = 0.1  # pass@1's interval


def about_one(results: Results) -> list[Verdict]:
    """Findings about one evaluation, the worst first."""
    return in_order([*_scale(results), *_cut(results), *_signal(results), *_width(results)])


def about_two(names: tuple[str, str], arms: tuple[list[Results], list[Results]],
              comparison: dict[str, Comparison]) -> list[Verdict]:  # fmt: skip
    """Findings about two arms, the worst first."""
    cut = [verdict for name, runs in zip(names, arms, strict=True) for verdict in _cut(runs[0], f"{name}: ")]
    return in_order([*cut, _difference(names, arms, comparison)])


def _difference(names: tuple[str, str], arms: tuple[list[Results], list[Results]],
                comparison: dict[str, Comparison]) -> Verdict:  # fmt: skip
    measure = next(iter(comparison))
    d = comparison[measure].difference
    problems = len(arms[0][0].problems)
    said = f"{measure} differs by {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}] over {problems:,} problems"
    if d.low > 0 or d.high < 0:
        better = names[1] if d.mean > 0 else names[0]
        return Verdict(
            "good",
            f"{better} is better",
            f"{said}: the interval does not contain 0.",
            "Before RL this says little about after: pear-megatron compare runs the same RL from both."
            if len(arms[0]) == 1
            else "The interval covers the seeds that were run; further seeds narrow it.",
        )
    half = (d.high - d.low) / 2
    needed = problems * (half / abs(d.mean)) ** 2 if d.mean else math.inf
    return Verdict(
        "note",
        "no clear difference",
        f"{said}: the interval contains 0.",
        f"About {_round(needed)} problems would tell a difference of this size from 0."
        if needed < 1e6
        else "If even the interval's ends would not matter to you, take the cheaper of the two.",
    )


def _round(count: float) -> str:
    digits = max(0, len(str(int(count))) - 2)
    return f"{math.ceil(count / 10**digits) * 10**digits:,}"


def _scale(results: Results) -> Iterator[Verdict]:
    """Scores on another scale than --right-at."""
    most = float(results.values("score").max())
    if results.right_at == 1.0 and most > 1.0:
        yield Verdict(
            "warning",
            "scores above 1",
            f"A problem's mean score is up to {most:g}, and a response counts as right from --right-at 1 on.",
            "Set --right-at to the score of a right answer; the same command then counts again.",
        )


def _cut(results: Results, whose: str = "") -> Iterator[Verdict]:
    share = float(results.values("truncated").mean())
    if share >= _FEW_CUT:
        yield Verdict(
            "warning" if share > _MANY_CUT else "note",
            f"{whose}responses cut off",
            f"{share:.0%} of the responses ran into --max-new-tokens {results.settings['max_new_tokens']} and were "
            "graded as they stood.",
            "Raise --max-new-tokens. If they still do not end, the model has not learnt its end-of-turn token: look "
            "at the data's loss_mask.",
        )


def _signal(results: Results) -> Iterator[Verdict]:
    """Whether RL would find anything to tell apart: responses that are all right or all wrong have no advantage."""
    right = np.array([problem.right for problem in results.problems])
    count, n = len(right), results.num_samples
    if not right.any():
        yield Verdict(
            "warning",
            "nothing solved",
            f"None of {count * n:,} responses is right, so GRPO would have no reward to start from.",
            "See in samples.jsonl whether the grader can read the answers; then take easier problems, draw more "
            "samples, or train SFT longer.",
        )
    elif (right == n).all():
        yield Verdict(
            "warning",
            "everything solved",
            f"All {count * n:,} responses are right: nothing is left to improve or to compare.",
            "Take harder problems.",
        )
    elif n > 1:
        mixed = float(((right > 0) & (right < n)).mean())
        yield Verdict(
            "warning" if mixed < _FEW_MIXED else "good",
            "little for RL to tell apart" if mixed < _FEW_MIXED else "problems that RL can learn from",
            f"On {mixed:.0%} of the problems some of {n} responses are right and some wrong; only there does GRPO "
            f"have an advantage. {(right == 0).mean():.0%} are never solved, {(right == n).mean():.0%} always.",
            "Leave out problems that are always or never solved, or draw more responses per problem."
            if mixed < _FEW_MIXED
            else "Nothing to change: RL can start from here.",
        )


def _width(results: Results) -> Iterator[Verdict]:
    measure, e = next(iter(results.estimates().items()))
    if e.high - e.low > _WIDE:
        yield Verdict(
            "note",
            "a wide interval",
            f"{measure} is known to lie between {e.low:.3f} and {e.high:.3f}: {len(results.problems):,} problems are "
            "few.",
            "Four times as many problems halve the interval; more samples per problem help less.",
        )
