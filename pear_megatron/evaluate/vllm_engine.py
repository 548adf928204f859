"""VllmEngine: vLLM on the GPUs of this machine, or on its CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pear_megatron.errors import EvalError
from pear_megatron.evaluate.sampling import Completion, Sampling

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class VllmEngine:
    """An Engine on vLLM, tensor-parallel over as many GPUs as divide the heads: see ``engines.load_engine``."""

    def __init__(self, model: Path, end_ids: list[int], sampling: Sampling, dtype: str) -> None:
        try:
            import torch
            from transformers import AutoConfig
            from vllm import LLM
        except ImportError as error:
            raise EvalError(
                f"the vllm engine cannot be imported ({error}); use --engine transformers"
            ) from error
        self._end_ids, self._sampling = end_ids, sampling
        heads = AutoConfig.from_pretrained(model).get_text_config().num_attention_heads
        try:
            self._llm = LLM(
                model=str(model),
                dtype=_DTYPES[dtype],
                tensor_parallel_size=math.gcd(heads, torch.cuda.device_count() or 1),
                generation_config="vllm",  # no top-k or penalties from generation_config.json
            )
        except Exception as error:  # whatever vLLM, or what reads the files for it, raises
            raise EvalError(
                f"vLLM cannot load {model}: {error} (what vLLM wrote above has the cause); mend it, or use --engine "
                "transformers"
            ) from error

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        """See Engine."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
                max_tokens=self._sampling.max_new_tokens,
                stop_token_ids=self._end_ids,
                seed=seed,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False
        )
        first = [output.outputs[0] for output in outputs]
        return [Completion(list(o.token_ids), truncated=o.finish_reason == "length") for o in first]
