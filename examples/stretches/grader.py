"""Grades an answer of the stretches world: the value at the end of each of its 4 stretches of 8 must be right."""

from __future__ import annotations


def grade(response: str, answer: str, problem: dict) -> float:
    """1 if all four are right. ``answer`` is the four values, as "3 17 0 22"."""
    symbols = response.split()
    return float(len(symbols) >= 32 and symbols[7:32:8] == answer.split())
