"""What the loss takes of each token, a chunk of tokens at a time: logits that never exist as a whole.

What ``GPTModel.forward(output_processor=...)`` hands over (megatron-core 0.19+) is enough for it: hidden states,
the output layer, and the embedding's weight where it is shared. ColumnParallelLinear is not called; what it
does around its GEMM, the hidden states' gradient summed over the tensor-parallel ranks or, under sequence
parallelism, gathered rows there and reduce-scattered gradients back, is done here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from pear_megatron.config import PearConfig
from pear_megatron.data.batches import PackedBatch
from pear_megatron.errors import RecipeError
from pear_megatron.loss import topk_of
from pear_megatron.megatron.model import unwrap
from pear_megatron.ops.output_layer import linear_statistics
from pear_megatron.ops.statistics import TokenStatistics


def statistics_in_chunks(
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    batch: PackedBatch,
    config: PearConfig,
    *,
    chunk_tokens: int,
    vocab_size: int,
    tp_group: torch.distributed.ProcessGroup | None = None,
) -> TokenStatistics:
    """Log-prob of each label of a micro-batch, with chunk_tokens x V/tp logits at a time, and what else the loss takes.

    Args:
        hidden_states: [s, b, h] floating, the output layer's input; [s/tp, b, h] under sequence parallelism.
        output_layer: mcore's ColumnParallelLinear.
        output_weight: [V/tp, h], the embedding's weight where it is shared; None = the layer's own.
        batch: its labels and loss mask are [b, s].
        config: says whether the loss takes a KL (of the batch's ``behavior_topk``) and the entropy.
        chunk_tokens: rows of logits that exist at a time.
        vocab_size: real tokens; columns beyond are Megatron's padding.
        tp_group: tensor-parallel group of the model.

    Returns:
        [b * s] float32 each, 0 off the mask.

    Raises:
        RecipeError: an output layer that does more than a GEMM.
    """
    _check_output_layer(output_layer)
    whole = not output_layer.sequence_parallel
    if not whole:
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        # Its backward is the reduce-scatter that sums the gradient over the ranks.
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp_group)
    return linear_statistics(
        hidden_states.transpose(0, 1).reshape(-1, hidden_states.shape[-1]),  # [b * s, h]
        output_layer.weight if output_weight is None else output_weight,
        batch.labels.view(-1),
        chunk_tokens=chunk_tokens,
        topk=topk_of(config, batch.behavior_topk),
        tail=config.kl_tail,
        entropy=config.needs_entropy,
        mask=batch.loss_mask.view(-1),
        tp_group=tp_group,
        vocab_size=vocab_size,
        reduce_hidden_gradient=whole,
    )


def supports_output_processor(model: Any) -> bool:
    """Whether the GPTModel inside ``model``, or a class of models, takes ``output_processor`` (megatron-core 0.19+)."""
    forward = (model if isinstance(model, type) else unwrap(model)).forward  # type: ignore[union-attr]
    return "output_processor" in inspect.signature(forward).parameters


def require_output_processor(model: Any) -> None:
    """Refuses a model, or a class of models, that train.output_chunk_tokens cannot work with.

    Raises:
        RecipeError: its forward takes no output_processor.
    """
    if not supports_output_processor(model):
        raise RecipeError(
            "train.output_chunk_tokens needs a model whose forward takes output_processor, as GPTModel's does from "
            f"megatron-core 0.19 on (Python 3.12); this {_name(model)} has none. Update "
            "megatron-core, or leave train.output_chunk_tokens out"
        )


def _name(model: Any) -> str:
    return (model if isinstance(model, type) else type(unwrap(model))).__name__


def _check_output_layer(output_layer: Any) -> None:
    """Whether the layer is a plain GEMM, so that chunks of it may be taken."""
    config = output_layer.config
    found = {
        "a bias": getattr(output_layer, "bias", None) is not None,
        "gathered output": bool(getattr(output_layer, "gather_output", False)),
        "multi-token prediction (mtp_num_layers)": bool(getattr(config, "mtp_num_layers", None)),
        "defer_embedding_wgrad_compute": bool(getattr(config, "defer_embedding_wgrad_compute", False)),
        "muP's scaled logits (use_mup)": bool(getattr(config, "use_mup", False)),
    }
    unfit = [name for name, there in found.items() if there]
    if unfit:
        raise RecipeError(
            f"train.output_chunk_tokens: the model's output layer has {' and '.join(unfit)}, which it cannot do "
            "in chunks of tokens; leave train.output_chunk_tokens out, or build the model without"
        )
