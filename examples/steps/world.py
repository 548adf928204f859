"""The steps world: sums of reasoning-gym, and programs that write solutions to them.

A problem is a chain sum of eight terms in characters, `3+4-7+2-9+5-1+6`; a solution writes the value after each step,
and the answer. A *plain* one takes one operation to a step, `+4=7;-7=0;+2=2;-9=-7;+5=-2;-1=-3;+6=3;#3`; a *terse* one
draws the size of each step from 1 to 4, `+4-7+2=2;-9+5-1+6=3;#3`.

A terse step asks for several operations with nothing written down, which a larger model can learn, and a smaller
one cannot: the gap between a teacher and its student.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import reasoning_gym

TERMS = 8  # 7 operations
LARGEST_STEP = 4  # operations in a step of a terse solution
TOKENS = ["<end>", *"0123456789+-=;#"]
END = 0
LONGEST = 64  # characters of a solution, its end included
HELDOUT_SEED = 1_000_003  # of reasoning-gym, and of no run: every run is asked the same held-out problems


@dataclass(frozen=True)
class Problem:
    """What is asked, and reasoning-gym's answer."""

    prompt: str
    answer: str


def problems(seed: int, count: int) -> list[Problem]:
    """Chain sums, the same for the same seed."""
    entries = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=count, min_terms=TERMS, max_terms=TERMS, min_digits=1, max_digits=1
    )
    return [Problem(entry["metadata"]["expression"].replace(" ", ""), entry["answer"]) for entry in entries]


def write_solution(rng: np.random.Generator, problem: Problem, plain: float, *, answered: bool = True) -> str:
    """A right solution: plain with probability ``plain``, otherwise terse; ``answered`` gives the answer at its end."""
    largest = 1 if rng.random() < plain else LARGEST_STEP
    first, *rest = re.findall(r"[+-]?\d", problem.prompt)
    value, text = int(first), ""
    while rest:
        size = int(rng.integers(1, largest + 1))
        taken, rest = rest[:size], rest[size:]
        value += sum(map(int, taken))
        text += f"{''.join(taken)}={value};"
    return f"{text}#{problem.answer}" if answered else text


def steps(problem: Problem, solution: str) -> list[tuple[int, bool]]:
    """How many operations each step of a solution takes, and whether it is right given the step before it."""
    value = int(problem.prompt[0])
    judged = []
    for operations, written in re.findall(r"((?:[+-]\d)+)=(-?\d+)", solution):
        value += sum(map(int, re.findall(r"[+-]\d", operations)))
        judged.append((len(operations) // 2, value == int(written)))
        value = int(written)
    return judged
