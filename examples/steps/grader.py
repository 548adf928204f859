"""Grades a solution of the steps world: what follows its last # must be the answer."""

from __future__ import annotations


def grade(response: str, answer: str, problem: dict) -> float:
    """1 if it is right; spaces count for nothing."""
    return float("#" in response and response.replace(" ", "").rsplit("#", 1)[1] == answer)
