"""PearError: what a user can mend; its message says what is wrong, where, and the way out."""

from __future__ import annotations


class PearError(Exception):
    """Base of the package's errors about recipes, data, checkpoints and training runs."""


class RecipeError(PearError, ValueError):
    """A recipe that cannot be used; the message says which key and what to do."""
