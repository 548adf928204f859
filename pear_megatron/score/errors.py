"""ScoreError: scoring cannot go on."""

from __future__ import annotations

from pear_megatron.errors import PearError


class ScoreError(PearError, RuntimeError):
    """A model, output or interrupted run that scoring cannot use; the message says the way out."""
