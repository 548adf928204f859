"""A tiny Llama over whole words, as an export of a model of a small world looks, and problems for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = ("a", "b", "c", "d", "e", "f", ".")  # "." ends a response

# The share of a response's words that are the answer.
GRADER = """
def grade(response, answer, problem):
    words = response.split()
    return words.count(answer) / max(1, len(words))
"""


def word_tokenizer(words: Sequence[str], end: str) -> Any:
    """A fast tokenizer whose token i is words[i], between white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end)


def save_word_model(folder: Path, *, seed: int = 0, words: Sequence[str] = WORDS, **changes: Any) -> Path:
    """One layer, random; spread enough that its samples differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 80,
        "initializer_range": 0.4,
        "eos_token_id": len(words) - 1,
        "bos_token_id": None,
        **changes,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    word_tokenizer(words, words[-1]).save_pretrained(folder)
    return folder


def write_problems(folder: Path, count: int = 6, grader: str = GRADER) -> Path:
    """problems.jsonl with prompts of different lengths, and problems.py."""
    rows = [
        {"id": f"p{i}", "prompt": " ".join((WORDS[:6] * 2)[i : 2 * i + 1 + i % 2]), "answer": WORDS[i % 3]}
        for i in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_suffix(".py").write_text(grader)
    return path
