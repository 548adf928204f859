"""Verdict: one finding of a page, what it means, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["error", "warning", "note", "good"]


@dataclass(frozen=True)
class Verdict:
    """One finding.

    Attributes:
        level: ``error`` = it is refused; ``warning`` = it would be something else than you want; ``note`` =
            good to know; ``good`` = as it should be.
        title: a few words.
        text: what was seen, and what it means.
        change: what to do about it.
    """

    level: Level
    title: str
    text: str
    change: str


def in_order(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The worst first; those of one level stay in their order."""
    return sorted(verdicts, key=lambda verdict: get_args(Level).index(verdict.level))
