"""The tiny model of words, also for GRPO with TRL."""

from __future__ import annotations

from tests.evaluate.conftest import word_model

__all__ = ["word_model"]
