"""training_flops: the FLOPs that training on some sequences takes, for the MFU and for ``plan``.

A dense decoder with L layers, hidden size h, a heads of d channels (q = a*d), g query groups (k = g*d), MLP
width f and V tokens in its vocabulary, on n tokens in sequences of n_1, n_2, ... tokens:

    forward  = 2 n [ L (h (q + 2k) + q h + m h f) + h V ]  +  2 L q sum_i n_i^2
    training = 3 forward

- m is 3 for SwiGLU (gate, up, down), 2 otherwise. A matrix product takes 2 FLOPs per weight and token.
- In a mixture m h f is that of the experts that a token goes to and of the shared one, and h E of the router is added:
  FLOPs are those of the active parameters.
- The second term is attention: scores, and their product with the values, take 2*q FLOPs each for a pair of
  tokens, and causal attention has n_i^2 / 2 pairs. The masked half is not counted: flash attention skips it.
- n_i are the lengths of the trajectories, not of the rows they are packed in: tokens of one trajectory do not
  see another's, and padding is no work that anyone asked for.
- Backward is twice forward; under LoRA the products with frozen weights have no weight gradient, and training
  takes 2 forward of them (the adapters' own products are left out).
- Recomputed activations are not counted (model FLOPs, not hardware FLOPs), nor are the embedding's look-up, norms,
  activation functions, the loss and the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable

from pear_megatron.plan.parameters import expert_parameters, layer_matrices
from pear_megatron.recipe import ModelConfig
from pear_megatron.recipe.sections import head_size


def flops_per_token(model: ModelConfig, *, frozen: bool = False) -> int:
    """Training FLOPs of one token in all matrix products with weights, which may be frozen (LoRA)."""
    routed = (model.moe_router_topk or 0) * expert_parameters(model) // (model.num_moe_experts or 1)
    layers = model.num_layers * (layer_matrices(model, 1) + routed)
    passes = 2 if frozen else 3
    return passes * 2 * (layers + model.hidden_size * model.vocab_size)


def training_flops(model: ModelConfig, lengths: Iterable[int], *, frozen: bool = False) -> int:
    """FLOPs of forward and backward over sequences of these lengths in tokens (see the formula above)."""
    lengths = [int(n) for n in lengths]
    q = model.num_attention_heads * head_size(model)
    attention = 3 * 2 * model.num_layers * q * sum(n * n for n in lengths)
    return flops_per_token(model, frozen=frozen) * sum(lengths) + attention
