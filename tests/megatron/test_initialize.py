"""Initial weights are what Megatron's initialisation means, and alike on every layout."""

from __future__ import annotations

from typing import Any

import torch

from tests.distributed import run_ranks
from tests.megatron.test_forward_step import MODEL, build


def rank_weights(rank: int, tp_size: int, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    model, _ = build(tp_size, MODEL.model_copy(update=options))
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}


OPTIONS = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "qk_layernorm": False,
    "embedding_init_method_std": 0.5,
}


def test_biases_are_zero_norms_one_and_matrices_have_their_deviation() -> None:
    weights = run_ranks(1, rank_weights, 1, OPTIONS)[0]
    for name, weight in weights.items():
        if name.endswith("bias"):
            assert bool((weight == 0).all()), name
        elif "layernorm" in name:
            assert bool((weight == 1).all()), name
    expected = {
        "embedding.word_embeddings.weight": 0.5,
        "decoder.layers.0.self_attention.linear_qkv.weight": 0.02,
        "decoder.layers.1.mlp.linear_fc1.weight": 0.02,
        "decoder.layers.1.mlp.linear_fc2.weight": 0.02 / 2,  # sqrt(2 x 2 layers)
        "output_layer.weight": 0.02,
    }
    for name, std in expected.items():
        real = weights[name][: MODEL.vocab_size] if "word" in name or "output" in name else weights[name]
        assert abs(real.std().item() / std - 1) < 0.1, name


def test_padded_vocabulary_rows_are_zero() -> None:
    weights = run_ranks(1, rank_weights, 1, {})[0]
    assert bool((weights["output_layer.weight"][MODEL.vocab_size :] == 0).all())


def test_tensor_parallel_shards_are_slices_of_the_whole() -> None:
    whole = run_ranks(1, rank_weights, 1, OPTIONS)[0]
    first, second = run_ranks(2, rank_weights, 2, OPTIONS)
    name = "embedding.word_embeddings.weight"
    torch.testing.assert_close(
        torch.cat([first[name], second[name]])[: MODEL.vocab_size], whole[name][: MODEL.vocab_size]
    )
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    torch.testing.assert_close(torch.cat([first[name], second[name]]), whole[name])
    # Each rank's first projection is [gate; up] of its part; the whole is [all gates; all ups].
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    gate, up = whole[name].chunk(2)
    gates, ups = zip(*(shard[name].chunk(2) for shard in (first, second)), strict=True)
    torch.testing.assert_close(torch.cat(gates), gate)
    torch.testing.assert_close(torch.cat(ups), up)
