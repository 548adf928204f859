"""Engines: what samples responses from a checkpoint, on transformers or vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pear_megatron.errors import EvalError

ENGINES = ("transformers", "vllm")


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
    """A loaded model.

    Attributes:
        batch_size: how many prompts it likes at once.
    """

    batch_size: int

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        """A response to each prompt, drawn with its own seed: what stands beside it in a batch is no matter."""


def load_engine(
    name: str, model: Path, end_ids: list[int], sampling: Sampling, dtype: str, batch_size: int
) -> Engine:
    """Loads a checkpoint.

    Args:
        name: ``transformers`` or ``vllm``.
        model: a Hugging Face folder.
        end_ids: token ids that end a response.
        sampling: how to draw.
        dtype: ``bf16`` or ``fp32``.
        batch_size: prompts at once.

    Raises:
        EvalError: the library is missing, or the model cannot be loaded.
    """
    if name == "transformers":
        from pear_megatron.evaluate.transformers_engine import TransformersEngine

        return TransformersEngine(model, end_ids, sampling, dtype, batch_size)
    if name == "vllm":
        from pear_megatron.evaluate.vllm_engine import VllmEngine

        return VllmEngine(model, end_ids, sampling, dtype, batch_size)
    raise EvalError(f"engine {name!r} is unknown; choose {' or '.join(ENGINES)}")
