"""Engines: what samples responses from a checkpoint, on transformers or vLLM."""

from __future__ import annotations

from pathlib import Path

from pear_megatron.evaluate.sampling import Engine, Sampling


def load_engine(name: str, model: Path, end_ids: list[int], sampling: Sampling, dtype: str) -> Engine:
    """Loads a Hugging Face folder into the engine of EvalSettings' name; ``end_ids`` end a response."""
    if name == "vllm":
        from pear_megatron.evaluate.vllm_engine import VllmEngine

        return VllmEngine(model, end_ids, sampling, dtype)
    from pear_megatron.evaluate.transformers_engine import TransformersEngine

    return TransformersEngine(model, end_ids, sampling, dtype)
