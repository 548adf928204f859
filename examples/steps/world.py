"""The steps world: arithmetic problems of reasoning-gym, and programs that write solutions to them.

Two families of problems; a problem and its solution are each one line of characters.

sums    `3+4-7+2-9+5-1+6` (chain_sum): the value after each step. `+4=7;-7=0;+2=2;-9=-7;+5=-2;-1=-3;+6=3;#3`, or
        with several operations to a step, `+4-7+2=2;-9+5-1+6=3;#3`.
bases   `137>3` (base_conversion): repeated division. `/3=45r2;/3=15r0;/3=5r0;/3=1r2;/3=0r1;#12002`, or with
        several digits to a step, `/27=5r002;/9=0r12;#12002`.

A *plain* solution takes one operation (one digit) to a step; a *terse* one draws the size of each step from 1 to 4.
A terse step asks for several operations with nothing written down, which a larger model can learn, and a smaller
one cannot: the gap between a teacher and its student.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import reasoning_gym

FAMILIES = ("sums", "bases")
TERMS = 8  # of a sum: 7 operations
LARGEST_STEP = 4  # operations, or digits, in a step of a terse solution
TOKENS = ["<end>", *"0123456789+-/=;#>r"]
END = 0
LONGEST = 64  # characters of a solution, its end included

_BASES = {"min_base": 3, "max_base": 5, "min_value": 50, "max_value": 250}


@dataclass(frozen=True)
class Problem:
    """What is asked, and reasoning-gym's answer."""

    family: str
    prompt: str
    answer: str


def problems(family: str, seed: int, count: int, *, terms: tuple[int, int] = (TERMS, TERMS)) -> list[Problem]:
    """Problems of one family, the same for the same seed.

    Args:
        family: of FAMILIES.
        seed: reasoning-gym's.
        count: how many.
        terms: the fewest and the most terms of a sum.
    """
    if family == "sums":
        size = {"min_terms": terms[0], "max_terms": terms[1], "min_digits": 1, "max_digits": 1}
        entries = reasoning_gym.create_dataset("chain_sum", seed=seed, size=count, **size)
        return [
            Problem(family, entry["metadata"]["expression"].replace(" ", ""), entry["answer"])
            for entry in entries
        ]
    entries = reasoning_gym.create_dataset("base_conversion", seed=seed, size=count, **_BASES)
    return [
        Problem(family, f"{meta['decimal_value']}>{meta['target_base']}", entry["answer"])
        for entry in entries
        for meta in [entry["metadata"]]
    ]


def write_solution(rng: np.random.Generator, problem: Problem, plain: float) -> str:
    """A right solution: plain with probability ``plain``, otherwise terse."""
    sizes = _ones() if rng.random() < plain else _up_to_four(rng)
    return (_solve_sum if problem.family == "sums" else _solve_base)(problem, sizes)


def step_sizes(solution: str) -> list[int]:
    """How many operations each step of a solution to a sum takes, right or not; [] where it has no steps."""
    return [len(step) // 2 for step in re.findall(r"((?:[+-]\d)+)=", solution)]


def steps_right(problem: Problem, solution: str) -> list[tuple[int, bool]]:
    """The size of each step of a solution to a sum, and whether it is right given the steps before it."""
    value = int(re.match(r"\d+", problem.prompt)[0])  # type: ignore[index]
    judged = []
    for operations, written in re.findall(r"((?:[+-]\d)+)=(-?\d+)", solution):
        value += sum(map(int, re.findall(r"[+-]\d", operations)))
        judged.append((len(operations) // 2, value == int(written)))
        value = int(written)
    return judged


def _ones() -> Iterator[int]:
    while True:
        yield 1


def _up_to_four(rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield int(rng.integers(1, LARGEST_STEP + 1))


def _solve_sum(problem: Problem, sizes: Iterator[int]) -> str:
    first, *rest = re.findall(r"[+-]?\d", problem.prompt)
    value, text = int(first), ""
    while rest:
        size = next(sizes)
        taken, rest = rest[:size], rest[size:]
        value += sum(map(int, taken))
        text += f"{''.join(taken)}={value};"
    return f"{text}#{problem.answer}"


def _solve_base(problem: Problem, sizes: Iterator[int]) -> str:
    number, base = map(int, problem.prompt.split(">"))
    text = ""
    while number:
        size = next(sizes)
        number, remainder = divmod(number, base**size)
        digits = "".join(str(remainder // base**i % base) for i in reversed(range(size)))
        text += f"/{base**size}={number}r{digits if number else digits.lstrip('0')};"
    return f"{text}#{problem.answer}"
