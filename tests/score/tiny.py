"""A random tiny Llama with a byte tokenizer, saved as Hugging Face saves it, and trajectories for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pear_megatron.data import Trajectory

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE = 258


def byte_tokenizer() -> Any:
    """A fast tokenizer over bytes with ChatML's special tokens."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny_llama(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Two layers, 4 heads over 2 groups, weights large enough for log-probs that differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "initializer_range": 0.3,
        **changes,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def without_tokenizer(model: Path, folder: Path) -> Path:
    """A copy of a model's configuration and weights alone: ranks that score ids need not import transformers."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(model / name, folder / name)
    return folder


def some_trajectories(count: int = 9, *, longest: int = 40, seed: int = 0) -> list[Trajectory]:
    """Random tokens; decisions in several runs, as in a conversation."""
    rng = np.random.default_rng(seed)
    trajectories = []
    for i in range(count):
        n = int(rng.integers(3, longest + 1))
        mask = rng.random(n) < 0.6
        mask[0], mask[-1] = False, True
        ids = rng.integers(0, VOCAB_SIZE, n, dtype=np.int32)
        trajectories.append(Trajectory(f"t{i}", ids, mask, np.zeros(n, dtype=np.float32)))
    return trajectories


def plainly_scored(folder: Path, trajectories: list[Trajectory], **options: Any) -> list[np.ndarray]:
    """What the model gives each token: transformers, one trajectory at a time, float64 log-softmax."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    scored = []
    with torch.no_grad():
        for trajectory in trajectories:
            ids = torch.tensor(trajectory.input_ids, dtype=torch.int64)
            logprobs = model(ids[None]).logits[0].double().log_softmax(-1)  # [n, V]
            row = np.zeros(len(ids), dtype=np.float32)
            for i in np.flatnonzero(trajectory.loss_mask):
                row[i] = logprobs[i - 1, ids[i]]
            scored.append(row)
    return scored
