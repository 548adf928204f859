"""Hugging Face weights into a Megatron-Core model, each rank its own part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pear_megatron.errors import CheckpointError
from pear_megatron.hf.mapping import (
    EMBEDDING,
    OUTPUT_LAYER,
    Parameter,
    checkpoint_name,
    parameters,
    part_views,
)
from pear_megatron.hf.weights import HFWeights
from pear_megatron.megatron.layout import Layout
from pear_megatron.megatron.model import as_chunks, unwrap


@torch.no_grad()
def load_weights(weights: HFWeights, model: Any, layout: Layout) -> None:
    """Fills every parameter of this rank in place, reading only its own slices.

    One tensor at a time is in memory beside the model. Nothing is communicated: every rank reads for itself.

    Args:
        weights: the checkpoint, opened.
        model: a GPTModel, wrapped or not, or a list of chunks.
        layout: where this rank stands.

    Raises:
        CheckpointError: a tensor cannot be read, or the model has a parameter that the checkpoint has not.
    """
    known = {(found.name, found.layer, found.expert): found for found in parameters(weights.model)}
    if weights.model.share_embeddings_and_output_weights:  # the last pipeline stage keeps a copy
        known[OUTPUT_LAYER, None, None] = known[EMBEDDING, None, None]
    first_expert = None
    if weights.model.num_moe_experts is not None:
        first_expert = layout.ep_rank * (weights.model.num_moe_experts // layout.ep_size)
    for gpt in map(unwrap, as_chunks(model)):
        layer_numbers = [layer.layer_number - 1 for layer in gpt.decoder.layers]
        for name, target in gpt.named_parameters():
            parameter = known.get(checkpoint_name(name, layer_numbers, first_expert))
            if parameter is None:
                raise CheckpointError(f"{weights.folder} has nothing for the model's parameter {name}")
            if parameter.expert is None:
                _fill(target, weights, parameter, layout.tp_group.rank(), layout.tp_size)
            else:
                _fill(target, weights, parameter, layout.expert_tp_rank, layout.expert_tp_size)


def _fill(target: Tensor, weights: HFWeights, parameter: Parameter, tp_rank: int, tp_size: int) -> None:
    if parameter.padded:
        start, stop = (min(rank * len(target), weights.model.vocab_size) for rank in (tp_rank, tp_rank + 1))
        target[stop - start :].zero_()
        target[: stop - start].copy_(weights.read(parameter.parts[0].name, 0, start, stop))
        return
    for part, view in zip(parameter.parts, part_views(parameter, target), strict=True):
        size = part.shape[parameter.split or 0] // tp_size
        piece = weights.read(part.name, parameter.split, tp_rank * size, (tp_rank + 1) * size)
        view.copy_(piece.view(view.shape))
