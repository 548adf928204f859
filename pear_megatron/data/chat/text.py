"""Where two texts meet."""

from __future__ import annotations


def common_prefix(a: str, b: str) -> str:
    """The text that both begin with."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def overlap(end: str, start: str) -> int:
    """How many characters at the end of the one are those at the start of the other."""
    return next((n for n in range(min(len(end), len(start)), 0, -1) if start.startswith(end[-n:])), 0)
