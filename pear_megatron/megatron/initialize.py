"""Initial weights that do not depend on how the model is split over ranks.

Megatron seeds each pipeline stage by itself, so a model's first loss changes with its layout. Here each
parameter is drawn whole, from a generator seeded by the run's seed and the parameter's global name, and
each rank keeps its slice: TP, PP and DP layouts start from the same model and can be compared.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from pear_megatron.megatron.model import as_chunks, unwrap

# Layers that write into the residual stream start smaller (GPT-2), as in Megatron's scaled init.
_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
_EMBEDDINGS = ("word_embeddings.weight", "position_embeddings.weight")
_VOCABULARY_ROWS = ("word_embeddings.weight", "output_layer.weight")


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers for the parameter of that name, whatever the layout."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _draw(name: str, shape: tuple[int, ...], seed: int, config: Any, vocab_size: int) -> Tensor:
    """The whole parameter ``name``, float32 on CPU."""
    key = name.rsplit("/", 1)[0]
    if len(shape) < 2:
        return torch.zeros(shape) if key.endswith("bias") else torch.ones(shape)
    std = config.init_method_std
    if key.endswith(_EMBEDDINGS):
        std = config.embedding_init_method_std
    if key.endswith(_RESIDUAL_OUTPUTS):
        std /= (2.0 * config.num_layers) ** 0.5
    if key.endswith(_VOCABULARY_ROWS):
        # Padding differs between layouts: draw the real rows, leave the padding at 0.
        rows = torch.zeros(shape)
        rows[:vocab_size].normal_(0.0, std, generator=generator_of(seed, name))
        return rows
    return torch.empty(shape).normal_(0.0, std, generator=generator_of(seed, name))


@torch.no_grad()
def initialize_weights(model: Any, *, seed: int, vocab_size: int) -> None:
    """Fills every parameter of a Megatron-Core GPT in place.

    Args:
        model: a GPTModel, wrapped or not, or a list of chunks.
        seed: of the run.
        vocab_size: real tokens; embedding rows from there on become 0.
    """
    for chunk in as_chunks(model):
        _initialize_chunk(unwrap(chunk), seed, vocab_size)


def _initialize_chunk(gpt: Any, seed: int, vocab_size: int) -> None:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = gpt.sharded_state_dict()
    apply_factories(state)  # splits fused gate and up projections into tensors of their own
    for shard in nested_values(state):
        if not isinstance(shard, ShardedTensor) or shard.data is None:
            continue
        layers = shard.prepend_axis_num
        name = f"{shard.key}/{shard.global_offset[:layers]}"
        whole = _draw(name, tuple(shard.global_shape[layers:]), seed, gpt.config, vocab_size)
        offset = shard.global_offset[layers:]
        local = shard.local_shape[-len(offset) :] if offset else ()
        window = tuple(slice(o, o + n) for o, n in zip(offset, local, strict=True))
        shard.data.copy_(whole[window].view(shard.data.shape))
