"""A random tiny Llama with a byte tokenizer, saved as Hugging Face saves it, and trajectories for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pear_megatron.data import Trajectory
from tests.byte_tokenizer import make_byte_tokenizer

VOCAB_SIZE = 258


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
    make_byte_tokenizer().save_pretrained(folder)
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
