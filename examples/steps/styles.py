"""What answers of the steps world are like: how much of them goes one operation to a step, and is right there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from examples.steps import world


def plain_steps(evaluation: Path, heldout: Path) -> tuple[float, float]:
    """The share of operations that answers take one to a step, and the share of those steps that are right.

    Args:
        evaluation: the output folder of ``pear-megatron eval``.
        heldout: the problems that it asked, as JSONL.
    """
    problems = {
        row["id"]: world.Problem(row["prompt"], row["answer"])
        for row in map(json.loads, heldout.read_text().splitlines())
    }
    operations, right = [], []
    for row in map(json.loads, (evaluation / "samples.jsonl").read_text().splitlines()):
        plain = [
            is_right for size, is_right in world.steps(problems[row["id"]], row["response"]) if size == 1
        ]
        operations.append(len(plain) / (world.TERMS - 1))
        right += plain
    return float(np.mean(operations)), float(np.mean(right)) if right else 0.0
