"""The search for the longest sequence that fits: what it finds, and that it ends."""

from __future__ import annotations

from typing import Any

import pytest


class Memory:
    """Fits what is no longer than ``tokens``, and counts the trials."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.trials = tokens, 0

    def fits(self, _step: Any, _fused: bool, tokens: int) -> bool:
        self.trials += 1
        assert self.trials < 30
        return tokens <= self.tokens


@pytest.mark.parametrize("tokens", [0, 4095, 4096, 5000, 20_000, 65_536, 99_999, 262_144, 10**9])
def test_the_largest_multiple_that_fits_is_found(tokens):
    from step import longest

    found = longest(Memory(tokens), None, False, unit=4096, limit=262_144, seconds=60)  # type: ignore[arg-type]
    assert found == min(tokens, 262_144) // 4096 * 4096


def test_it_ends_when_its_time_is_over():
    from step import longest

    assert longest(Memory(10**9), None, False, unit=1, limit=10**9, seconds=0) == 0  # type: ignore[arg-type]
