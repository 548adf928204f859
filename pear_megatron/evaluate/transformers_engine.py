"""TransformersEngine: batched generate() of transformers, each row with random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopPLogitsWarper,
)
from transformers.utils import logging

from pear_megatron.errors import EvalError
from pear_megatron.evaluate.sampling import Completion, Sampling

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TransformersEngine:
    """An Engine on one GPU, or on the CPU where there is none: see ``engines.load_engine``."""

    def __init__(self, model: Path, end_ids: list[int], sampling: Sampling, dtype: str) -> None:
        self._end_ids, self._sampling = end_ids, sampling
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logging.disable_progress_bar()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, dtype=_DTYPES[dtype], use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise EvalError(f"{model} cannot be loaded: {error}") from error
        self._model = loaded.to(self._device).eval()
        # Where a generation_config.json asks for top-k or penalties, generate() would fill them in from here.
        self._model.generation_config = GenerationConfig()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        """See Engine."""
        longest = max(map(len, prompts))
        pad = self._end_ids[0]
        padding = [longest - len(prompt) for prompt in prompts]
        tokens = [[pad] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        config = GenerationConfig(
            max_new_tokens=self._sampling.max_new_tokens,
            do_sample=False,  # the processor below has drawn when generate() takes the largest
            eos_token_id=self._end_ids,
            pad_token_id=pad,
        )
        output = self._model.generate(
            input_ids=torch.tensor(tokens, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_DrawWithOwnSeed(seeds, longest, self._sampling)]),
        )
        return [self._completion(row) for row in output[:, longest:].tolist()]  # [B, new]

    def _completion(self, row: list[int]) -> Completion:
        for i, token in enumerate(row):
            if token in self._end_ids:
                return Completion(row[: i + 1], truncated=False)
        return Completion(row, truncated=True)


class _DrawWithOwnSeed(LogitsProcessor):
    """Draws a token for each row with that row's random numbers, and leaves only its score standing.

    Token t of a row is where the cumulated probabilities pass the row's t-th uniform number. Two checkpoints
    see the same numbers, which makes their comparison sharper.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, sampling: Sampling) -> None:
        self._prompt_length, self._temperature = prompt_length, sampling.temperature
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1.0 else None
        count = sampling.max_new_tokens
        uniform = [np.random.default_rng(seed).random(count) for seed in seeds]
        self._uniform = torch.from_numpy(np.stack(uniform))  # float64 [B, new]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, S], [B, V] -> [B, V]
        if self._temperature == 0.0:
            return scores
        scaled = scores.float() / self._temperature
        if self._top_p is not None:
            scaled = self._top_p(input_ids, scaled)
        cumulated = scaled.softmax(-1).double().cumsum(-1)
        step = input_ids.shape[1] - self._prompt_length
        uniform = self._uniform[:, step, None].to(scores.device) * cumulated[:, -1:]
        drawn = torch.searchsorted(cumulated, uniform, right=True).clamp(max=scores.shape[1] - 1)  # [B, 1]
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
