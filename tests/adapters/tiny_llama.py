"""A tiny Llama with a tokenizer, for other stacks' trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 1002


def save_tiny_llama(folder: Path, **changed: Any) -> None:
    """A Hugging Face folder of two layers, with the weights of seed 0 and a word for each id.

    Args:
        folder: where it goes.
        changed: what its config has otherwise.
    """
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(VOCABULARY - 2)} | {"<unk>": VOCABULARY - 2, "<pad>": VOCABULARY - 1}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<pad>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": VOCABULARY - 1, "eos_token_id": VOCABULARY - 1, "dtype": "float32", **changed,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
