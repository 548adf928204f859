"""A recipe small enough to be measured on the CPU."""

from __future__ import annotations

from typing import Any

from pear_megatron.recipe import Recipe

MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 192,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
}


def recipe(*, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
    train = {"global_batch_size": 4, **sections.pop("train", {})}
    return Recipe.model_validate(
        {
            "output_dir": "unused",
            "model": MODEL | (model or {}),
            "data": {"train": "unused", "seq_length": 128},
            "train": train,
            **sections,
        }
    )
