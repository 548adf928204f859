"""PearError: what a user can mend; its message says what is wrong, where, and the way out."""

from __future__ import annotations


class PearError(Exception):
    """Base of the package's errors about recipes, data, checkpoints and training runs."""


class RecipeError(PearError, ValueError):
    """A recipe that cannot be used; the message says which key and what to do."""


class CheckpointError(PearError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class ScoreError(PearError, RuntimeError):
    """A model, output or interrupted run that scoring cannot use; the message says the way out."""


class EvalError(PearError, RuntimeError):
    """A model, setting or interrupted evaluation that cannot be used; the message says the way out."""


class BuildError(PearError, RuntimeError):
    """Compiled ops that cannot do what they are asked to; the message says how to build them."""


def one_sentence(error: BaseException) -> str:
    """The message of an error; of a torch that is not installed, the way out."""
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return "torch is not installed, and everything here needs it: pip install torch, then pear-megatron again"
    return str(error)
