"""Bytes that forward keeps for backward, on one rank: Korthikanti et al. (arXiv 2205.05198), for these models.

Per transformer layer and token, in elements of the training precision, with h the hidden size, q and k the
widths of queries and of keys, f the MLP's, T tensor-parallel ranks, and S = T with sequence parallelism, else 1:

    norms          4h / S          each of the two keeps its input and its output
    attention      (2q + 2k) / T   queries, keys, values and their output; flash attention keeps no scores
    QK norm        (q + k) / T     their inputs, where the model has it
    MLP            3f / T          SwiGLU's input (gate and up) and output; 2f / T for GELU
    rotary         4d              cosines and sines of queries and of keys, not split

In a mixture whose experts T' ranks share, with k experts per token, E in all and their load even, in place of the MLP:

    router         2E / S          its logits and weights, in float32
    experts        3kf / T         as an MLP's, for k experts of width f
    dispatch       3kh T' / T      what an expert gets, gives, and is weighed; gathered over T'
    shared         3f / T          of its own width

and the softmax's float32 log-sum-exp, one per head and token. With q = k = h, f = 4h, GELU, d = 0 and two bytes
this is the paper's 34h less its two bytes of dropout masks, which are not there: dropout is 0.

A recomputed MLP keeps nothing, and recomputed attention no log-sum-exp, but (q + k) / T more: its values are a view
into the fused projection's output, which stays with them.

Trajectories are packed (thd), so that a micro-batch of b rows is one sequence of b x seq_length tokens. In float32
attention runs a trajectory at a time and its output is kept twice, q / T more. ``train.attention=mask`` keeps the
softmax instead of its log-sum-exp: seq_length / T float32 numbers for each head and token, and in bfloat16 a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from pear_megatron.recipe import Recipe, TrainConfig
from pear_megatron.recipe.sections import (
    expert_size,
    expert_tensor_size,
    head_size,
    padded_vocab_size,
    query_groups,
)

_FLOAT32 = 4
_LOSS_BYTES = 72  # a token's targets, mask, log-probs and weights, all [T] vectors, and the batch itself
_GATHERED_BYTES = 12  # a token's three float32 numbers from each tensor-parallel rank


@dataclass(frozen=True)
class Activations:
    """Sizes of one micro-batch's tensors on one rank, in bytes.

    Attributes:
        layer: kept by one transformer layer without recomputation.
        hidden: one tensor of hidden states, split over S: what a recomputed layer keeps.
        logits: the output layer's result, in the training precision; of a chunk where the recipe has chunks.
        loss: what PEAR adds: vectors of one entry a token; backward writes over the logits.
        layer_backward: gradients inside one layer while it runs backward, its largest weight's included.
        output_backward: the same for the output layer.
    """

    layer: int
    hidden: int
    logits: int
    loss: int
    layer_backward: int
    output_backward: int


def activations(recipe: Recipe) -> Activations:
    """The sizes of a recipe's micro-batch."""
    model, parallel, train = recipe.model, recipe.parallel, recipe.train
    element = 2 if train.precision == "bf16" else 4
    tokens = recipe.data.seq_length * train.micro_batch_size // parallel.context_parallel_size
    tp = parallel.tensor_model_parallel_size
    split = tp if parallel.sequence_parallel else 1
    h, f, head = model.hidden_size, model.ffn_hidden_size, head_size(model)
    q, k = model.num_attention_heads * head, query_groups(model) * head
    fc1 = 2 * f if model.activation == "swiglu" else f

    mlp = (fc1 + f) / tp
    backward, largest = (fc1 + f) // tp + 2 * h, h * fc1 // tp
    if model.num_moe_experts is not None:
        k, expert_tp = model.moe_router_topk or 0, expert_tensor_size(parallel)
        wide = fc1 // f * expert_size(model) + expert_size(model)
        shared = (fc1 // f + 1) * (model.moe_shared_expert_intermediate_size or 0)
        spread = k * h * expert_tp / tp
        mlp = (k * wide + shared) / tp + 3 * spread + 2 * model.num_moe_experts / split * (4 / element)
        backward = int((k * wide + shared) / tp + 2 * spread + 2 * h)
        largest = h * fc1 // f * expert_size(model) // expert_tp

    again = _recomputed_modules(train)
    attention = 2 * q + 2 * k + (q + k if model.qk_layernorm else 0)
    if "core_attn" in again:
        attention += q + k  # of its inputs, the values are a part of the fused projection's output
    kept = 4 * h / split + attention / tp + (0 if "mlp" in again else mlp)
    if model.position_embedding_type == "rope":
        kept += 4 * head
    softmax = _softmax_bytes(recipe, q) / tp
    columns = padded_vocab_size(model.vocab_size, tp) // tp
    return Activations(
        layer=int(tokens * (element * kept + softmax)),
        hidden=tokens * element * h // split,
        logits=min(tokens, train.output_chunk_tokens or tokens) * element * columns,
        loss=tokens * (_LOSS_BYTES + _GATHERED_BYTES * tp),
        # Of the MLP: gradients of both its inner tensors, and hidden states gathered for them, there and back.
        layer_backward=element * (tokens * backward + largest),
        output_backward=element * (tokens * 2 * h + columns * h),
    )


def _recomputed_modules(train: TrainConfig) -> tuple[str, ...]:
    """What every layer computes again: it keeps its input, which is another's output."""
    if train.recompute_granularity != "selective":
        return ()
    return train.recompute_modules or ("core_attn",)


def _softmax_bytes(recipe: Recipe, q: int) -> int:
    """What attention keeps of a token besides its inputs and output, which are q elements wide."""
    train, heads = recipe.train, recipe.model.num_attention_heads
    if "core_attn" in _recomputed_modules(train):
        return 0
    if train.attention == "mask":
        copy = 2 if train.precision == "bf16" else 0
        return (_FLOAT32 + copy) * heads * recipe.data.seq_length
    return _FLOAT32 * heads + (_FLOAT32 * q if train.precision == "fp32" else 0)
