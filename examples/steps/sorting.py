"""Another task family for the student of the steps world: reasoning-gym's number sorting, which its teacher never saw.

Six digits to sort upwards, `+5;3;9;1;7;2`, or downwards, `-5;3;9;1;7;2`; a solution inserts one after the other,
`=5=35=359=1359=13579=123579;#123579`. The characters and the grader are those of the sums.
"""

from __future__ import annotations

import reasoning_gym

from examples.steps.world import Problem

DIGITS = 6


def problems(seed: int, count: int) -> list[Problem]:
    """Lists of digits to sort, the same for the same seed."""
    entries = reasoning_gym.create_dataset(
        "number_sorting", seed=seed, size=count, min_numbers=DIGITS, max_numbers=DIGITS,
        min_decimals=0, max_decimals=0, min_value=0, max_value=9,
    )  # fmt: skip
    made = []
    for facts in (entry["metadata"] for entry in entries):
        given, wanted = (
            [str(int(float(n))) for n in facts[f"{key}_numbers"]] for key in ("original", "sorted")
        )
        sign = "+" if facts["direction"] == "ascending" else "-"
        made.append(Problem(sign + ";".join(given), "".join(wanted)))
    return made


def write_solution(problem: Problem) -> str:
    """The right solution: the digits so far, sorted, after each insertion."""
    given, downwards = problem.prompt[1:].split(";"), problem.prompt[0] == "-"
    lists = ("".join(sorted(given[:n], reverse=downwards)) for n in range(1, DIGITS + 1))
    return "=" + "=".join(lists) + f";#{problem.answer}"
