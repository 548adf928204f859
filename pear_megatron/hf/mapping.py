"""Which Hugging Face tensors make up which Megatron-Core parameter, and how: the one table both directions read.

Names on Megatron's side are those of its checkpoints, where every layer specification agrees. They are the
Transformer Engine layers' parameter names, which put each norm into the projection behind it; the local
layers' own names for these norms are in LOCAL_NAMES. A tensor-parallel rank's parameter is made of its slices
of the tensors in the same way as a whole parameter of whole tensors. Checkpoints stack experts as they stack
layers; in a model an expert's number is in its parameters' names, counted within the rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pear_megatron.recipe import ModelConfig
from pear_megatron.recipe.hf_config import family_of
from pear_megatron.recipe.sections import expert_size, head_size, query_groups

if TYPE_CHECKING:
    from torch import Tensor

# Parameters of the local layer specification -> names in checkpoints and of Transformer Engine's layers.
LOCAL_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# A mixture's norm has no one projection behind it, and is itself in every specification.
_MIXTURE_LOCAL_NAMES = {"input_layernorm.weight": LOCAL_NAMES["input_layernorm.weight"]}
_EXPERTS = "mlp.experts.experts."
# An expert's parameter in a model: of SequentialMLP, or of Transformer Engine's grouped GEMM.
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<one>\d+)\.(?P<fc>linear_fc[12])|(?P<grouped>linear_fc[12]))"
    r"\.weight(?P<number>\d*)"
)
_LAYER = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor: its name and whole shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One Megatron-Core parameter.

    Attributes:
        name: in checkpoints and of Transformer Engine's layers, without the layer's number.
        layer: the layer's number in the whole model; None outside the layers.
        parts: the tensors that it is made of, one after the other along the first axis.
        split: the axis that tensor-parallel ranks share; None: every rank holds all of it.
        group: rows of each part that make one query group; the groups follow each other, each with its
            query, key and value rows. None: all rows of a part, then the next part.
        padded: rows beyond the part's are Megatron's padding of the vocabulary, and 0.
        expert: the expert's number in the whole layer; None of what is no routed expert's. ``split`` is then over the
            expert-tensor-parallel ranks.
    """

    name: str
    layer: int | None
    parts: tuple[Part, ...]
    split: int | None
    group: tuple[int, ...] | None = None
    padded: bool = False
    expert: int | None = None


def parameters(model: ModelConfig) -> list[Parameter]:
    """Every parameter of the model, in the order of a Hugging Face checkpoint."""
    hidden = model.hidden_size
    vocabulary = (model.vocab_size, hidden)
    found = [
        Parameter(EMBEDDING, None, (Part("model.embed_tokens.weight", vocabulary),), split=0, padded=True)
    ]
    for layer in range(model.num_layers):
        found += _layer_parameters(model, layer)
    found.append(
        Parameter("decoder.final_layernorm.weight", None, (Part("model.norm.weight", (hidden,)),), split=None)
    )
    if not model.share_embeddings_and_output_weights:
        found.append(
            Parameter(OUTPUT_LAYER, None, (Part("lm_head.weight", vocabulary),), split=0, padded=True)
        )
    return found


def _layer_parameters(model: ModelConfig, layer: int) -> list[Parameter]:
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size, head_size(model)
    q, kv = model.num_attention_heads * head, query_groups(model) * head

    def parameter(
        name: str,
        *parts: tuple[str, tuple[int, ...]],
        split: int | None = None,
        group: tuple[int, ...] | None = None,
    ) -> Parameter:
        named = tuple(Part(f"model.layers.{layer}.{part}", shape) for part, shape in parts)
        return Parameter(_LAYER + name, layer, named, split, group)

    attention = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)]
    weights = [(f"{name}.weight", (rows, hidden)) for name, rows in attention]
    biases = [(f"{name}.bias", (rows,)) for name, rows in attention]
    group = (q // query_groups(model), head, head)
    found = [
        parameter("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight", (hidden,))),
        parameter("self_attention.linear_qkv.weight", *weights, split=0, group=group),
    ]
    if model.add_qkv_bias:
        found.append(parameter("self_attention.linear_qkv.bias", *biases, split=0, group=group))
    if model.qk_layernorm:
        found.append(parameter("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight", (head,))))
        found.append(parameter("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight", (head,))))
    found.append(
        parameter("self_attention.linear_proj.weight", ("self_attn.o_proj.weight", (hidden, q)), split=1)
    )
    if model.num_moe_experts is not None:
        return found + _mixture_parameters(model, layer)
    gate_up = [("mlp.gate_proj.weight", (ffn, hidden)), ("mlp.up_proj.weight", (ffn, hidden))]
    found += [
        parameter("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight", (hidden,))),
        parameter("mlp.linear_fc1.weight", *gate_up, split=0),
        parameter("mlp.linear_fc2.weight", ("mlp.down_proj.weight", (hidden, ffn)), split=1),
    ]
    return found


def _mixture_parameters(model: ModelConfig, layer: int) -> list[Parameter]:
    """The norm, the router, the experts and the shared one, in place of a dense layer's MLP."""
    hidden, ffn, shared = model.hidden_size, expert_size(model), model.moe_shared_expert_intermediate_size
    mixtral = family_of(model).experts == "mixtral"
    block = f"model.layers.{layer}." + ("block_sparse_moe." if mixtral else "mlp.")
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    experts = model.num_moe_experts or 0

    def mlp(name: str, part: str, width: int, expert: int | None = None) -> list[Parameter]:
        fc1 = tuple(Part(f"{block}{part}{which}.weight", (width, hidden)) for which in (gate, up))
        fc2 = (Part(f"{block}{part}{down}.weight", (hidden, width)),)
        return [
            Parameter(f"{_LAYER}{name}linear_fc1.weight", layer, fc1, split=0, expert=expert),
            Parameter(f"{_LAYER}{name}linear_fc2.weight", layer, fc2, split=1, expert=expert),
        ]

    norm = Part(f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,))
    router = Part(f"{block}gate.weight", (experts, hidden))
    found = [
        Parameter(_LAYER + "pre_mlp_layernorm.weight", layer, (norm,), split=None),
        Parameter(_LAYER + "mlp.router.weight", layer, (router,), split=None),
    ]
    for expert in range(experts):
        found += mlp(_EXPERTS, f"experts.{expert}.", ffn, expert)
    if shared is not None:
        found += mlp("mlp.shared_experts.", "shared_expert.", shared)
        gate_part = Part(f"{block}shared_expert_gate.weight", (1, hidden))
        found.append(Parameter(_LAYER + "mlp.shared_experts.gate_weight", layer, (gate_part,), split=None))
    return found


def checkpoint_name(
    name: str, layer_numbers: list[int], first_expert: int | None = None
) -> tuple[str, int | None, int | None]:
    """A model's own parameter name -> its name in checkpoints, its layer and its expert in the whole model.

    Args:
        name: as ``named_parameters`` gives it; the numbers in it count within this rank.
        layer_numbers: for each layer of this stage, its number in the whole model, from 0.
        first_expert: of this rank's experts, the first one's number; None = the model has none.
    """
    if not name.startswith(_LAYER):
        return name, None, None
    local, _, inner = name.removeprefix(_LAYER).partition(".")
    layer = layer_numbers[int(local)]
    if first_expert is None:
        return _LAYER + LOCAL_NAMES.get(inner, inner), layer, None
    if (found := _EXPERT.fullmatch(inner)) is not None:
        projection, number = found["fc"] or found["grouped"], found["one"] or found["number"]
        return f"{_LAYER}{_EXPERTS}{projection}.weight", layer, first_expert + int(number)
    return _LAYER + _MIXTURE_LOCAL_NAMES.get(inner, inner), layer, None


def part_views(parameter: Parameter, tensor: Tensor) -> list[Tensor]:
    """Where the parts are in the parameter, as views: of a whole parameter, or of one tensor-parallel rank's.

    A view has as many elements as the part, in the part's order; of a query group it is
    [groups, rows of a group, ...].
    """
    if parameter.group is None:
        return list(tensor.chunk(len(parameter.parts)))
    groups = tensor.unflatten(0, (-1, sum(parameter.group)))
    return list(groups.split(parameter.group, dim=1))
