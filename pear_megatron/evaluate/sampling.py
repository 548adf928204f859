"""What an engine is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: the smallest set of tokens with this much probability; 1 = all.
        max_new_tokens: a response that has not ended by then is truncated.
    """

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """One response: its token ids, the end token included, and whether it was cut before one."""

    tokens: list[int]
    truncated: bool


class Engine(Protocol):
    """A loaded model."""

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        """A response to each prompt, drawn with its own seed: what stands beside it in a batch is no matter."""
