"""Rows that carry both policies' log-probs, and what inspect made of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.structured import make_rows

Row = dict[str, Any]


@dataclass
class Inspected:
    """What one `inspect` command left behind."""

    exit_code: int
    stdout: str
    stderr: str
    page: str | None
    numbers: dict[str, Any]

    def titles(self, *levels: str) -> list[str]:
        return [v["title"] for v in self.numbers["verdicts"] if not levels or v["level"] in levels]

    def verdict(self, title: str) -> dict[str, str]:
        return next(verdict for verdict in self.numbers["verdicts"] if verdict["title"] == title)


Inspect = Callable[..., Inspected]


def scored(
    policy: Callable[[float, random.Random], float] = lambda lb, rng: lb,
    *,
    count: int = 30,
    tokens: int = 60,
    shift: int = 0,
    **changes: Any,
) -> list[Row]:
    """Structured rows; ``policy`` gives a decision's log-prob from the behaviour policy's own."""
    rng = random.Random(3)
    truth = make_rows(count, tokens=tokens, seed=5)
    rows = make_rows(count, tokens=tokens, seed=5, shift=shift)
    for row, true in zip(rows, truth, strict=True):
        row["policy_logprobs"] = [
            None if lb is None else min(0.0, policy(lb, rng)) for lb in true["behavior_logprobs"]
        ]
        row.update(changes)
    return rows
