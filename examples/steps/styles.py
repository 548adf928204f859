"""What answers of the steps world are like: how much goes one operation to a step, and what is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.steps import world
from examples.steps.rows import read_rows


def read_problems(path: Path) -> dict[str, world.Problem]:
    """The problems of a file of ``write_problems``, by id."""
    return {row["id"]: world.Problem(row["prompt"], row["answer"]) for row in read_rows(path)}


def plain_steps(evaluation: Path, problems: dict[str, world.Problem]) -> tuple[float, float]:
    """The share of operations that answers take one to a step, and the share of those steps that are right.

    Args:
        evaluation: the output folder of ``pear-megatron eval``.
        problems: that it asked, by id.
    """
    operations, right = [], []
    for row in read_rows(evaluation / "samples.jsonl"):
        plain = [
            is_right for size, is_right in world.steps(problems[row["id"]], row["response"]) if size == 1
        ]
        operations.append(len(plain) / (world.TERMS - 1))
        right += plain
    return float(np.mean(operations)), float(np.mean(right)) if right else 0.0


def first_steps_right(evaluation: Path, problems: dict[str, world.Problem]) -> float:
    """The share of answers whose first step, of any size, takes the problem's next operations to the right value."""
    right = []
    for row in read_rows(evaluation / "samples.jsonl"):
        problem, judged = problems[row["id"]], world.steps(problems[row["id"]], row["response"])
        copied = judged and row["response"].startswith(problem.prompt[1 : 1 + 2 * judged[0][0]] + "=")
        right.append(bool(copied and judged[0][1]))
    return float(np.mean(right))
