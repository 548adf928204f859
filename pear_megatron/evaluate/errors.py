"""EvalError: an evaluation cannot go on."""

from __future__ import annotations

from pear_megatron.errors import PearError


class EvalError(PearError, RuntimeError):
    """A model, setting or interrupted evaluation that cannot be used; the message says the way out."""
