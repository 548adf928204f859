"""LoRA on a Megatron-Core GPT: A and B beside its frozen projections, split over ranks as the projections are.

Megatron fuses q, k and v, and gate and up; each keeps an A and a B of its own, so that the adapters are PEFT's.
A layer's adapters are its submodule ``lora``, and forward hooks on its linear layers add what they give.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pear_megatron.hf.lora import lora_parameters
from pear_megatron.megatron.initialize import generator_of
from pear_megatron.megatron.layout import Layout
from pear_megatron.megatron.model import as_chunks, unwrap
from pear_megatron.recipe import LoraConfig, ModelConfig
from pear_megatron.recipe.sections import head_size, query_groups

_MARK = ".lora."
# Megatron's linear layers, and the projections that each holds, in the order of its output.
_LINEARS = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}


class Adapter(nn.Module):
    """A and B of one projection on this rank.

    Attributes:
        lora_A: [rank, in], or this rank's columns of it (row-parallel projections).
        lora_B: [out, rank], or this rank's rows of it (column-parallel projections).
    """

    def __init__(self, lora_a: Tensor, lora_b: Tensor, *, split: str, scale: float, layout: Layout) -> None:
        from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(lora_a), nn.Parameter(lora_b)
        self.split, self.scale = split, scale
        self.group, self.sequence_parallel = layout.tp_group, layout.sequence_parallel
        column = split == "out"
        set_tensor_model_parallel_attributes(self.lora_A, not column, 1, 1)
        set_tensor_model_parallel_attributes(self.lora_B, column, 0, 1)
        if (
            layout.sequence_parallel
        ):  # seen by each rank on its part of the sequence: Megatron adds up the gradients
            whole = self.lora_A if column else self.lora_B
            whole.sequence_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, in] as the projection gets it -> scale * B A x, [s, b, out] as the projection gives it."""
        from megatron.core.tensor_parallel import mappings

        hidden = F.linear(x, self.lora_A)
        if self.split == "out":
            send = (
                mappings.gather_from_sequence_parallel_region
                if self.sequence_parallel
                else mappings.copy_to_tensor_model_parallel_region
            )
        else:
            send = (
                mappings.reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else mappings.reduce_from_tensor_model_parallel_region
            )
        return F.linear(send(hidden, group=self.group) * self.scale, self.lora_B)


class LayerAdapters(nn.ModuleDict):
    """The adapters of a transformer layer, by projection."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron's modules have it."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        axes: dict[str, int] = {}
        for name, adapter in self.items():
            axes |= {f"{name}.lora_B": 0} if adapter.split == "out" else {f"{name}.lora_A": 1}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)


def add_adapters(model: Any, config: ModelConfig, lora: LoraConfig, layout: Layout, *, seed: int) -> None:
    """Freezes a model and puts adapters beside its projections: A random, B zero, so that nothing changes yet.

    Args:
        model: a GPTModel with its weights, in Float16Module or not, not yet in DDP; or a list of chunks.
        config: its sizes.
        lora: rank, alpha and which projections.
        layout: where this rank stands.
        seed: of A, which depends on neither the layout nor the other projections.
    """
    shapes = {(p.layer, *p.name.rsplit(".", 2)[1:]): p for p in lora_parameters(config, lora)}
    for chunk in map(unwrap, as_chunks(model)):
        for parameter in chunk.parameters():
            parameter.requires_grad = False
        if getattr(chunk, "embedding", None) is not None:
            # Recomputed layers give no gradient where their input asks for none.
            chunk.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
        like = next(chunk.parameters())
        for layer in chunk.decoder.layers:
            layer.lora = LayerAdapters()
            for path, names in _LINEARS.items():
                linear = layer.get_submodule(path)
                for name in (n for n in names if n in lora.target_modules):
                    pair = [shapes[layer.layer_number - 1, name, matrix] for matrix in ("lora_A", "lora_B")]
                    tensors = [_fresh(p, layout, seed).to(like.device, like.dtype) for p in pair]
                    layer.lora[name] = Adapter(
                        *tensors,
                        split="in" if pair[0].split == 1 else "out",
                        scale=lora.alpha / lora.rank,
                        layout=layout,
                    )
                present = [dict(layer.lora).get(name) for name in names]
                if any(adapter is not None for adapter in present):
                    linear.register_forward_hook(_hook(present, config, layer.config))


def _fresh(parameter: Any, layout: Layout, seed: int) -> Tensor:
    """This rank's part of an initial A (uniform, as PEFT draws it) or B (zero), float32."""
    (part,) = parameter.parts
    if parameter.name.endswith("lora_B"):
        whole = torch.zeros(part.shape)
    else:
        bound = part.shape[1] ** -0.5
        whole = torch.empty(part.shape).uniform_(-bound, bound, generator=generator_of(seed, part.name))
    if parameter.split is None:
        return whole
    return whole.chunk(layout.tp_size, parameter.split)[layout.tp_group.rank()].contiguous()


def _hook(adapters: list[Any], model: ModelConfig, config: Any) -> Any:
    """A forward hook that adds what the adapters of a linear layer's projections give to its output."""

    def hook(linear: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> Any:
        out, bias = output
        x = _normed(linear, args[0], config)
        parts: list[Any] = [None if adapter is None else adapter(x) for adapter in adapters]
        if len(parts) == 1:
            return out + parts[0], bias
        if len(parts) == 3:
            return out + _interleaved(parts, out, model), bias
        half = out.shape[-1] // 2
        return out + torch.cat([_or_zero(part, out, half) for part in parts], dim=-1), bias

    return hook


def _normed(linear: Any, x: Tensor, config: Any) -> Tensor:
    """What the projection multiplies: Transformer Engine's fused layers take their norm's input instead."""
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return x
    if config.normalization == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, config.layernorm_epsilon)
    return F.layer_norm(x, weight.shape, weight, linear.layer_norm_bias, config.layernorm_epsilon)


def _or_zero(part: Tensor | None, like: Tensor, width: int) -> Tensor:
    return like.new_zeros(*like.shape[:-1], width) if part is None else part


def _interleaved(parts: list[Tensor | None], out: Tensor, model: ModelConfig) -> Tensor:
    """q, k and v [..., rows] -> Megatron's order: for each query group its query heads, its key, its value."""
    head = head_size(model)
    heads = model.num_attention_heads // query_groups(model)  # query heads of a group
    groups = out.shape[-1] // ((heads + 2) * head)
    widths = (heads * head, head, head)
    grouped = [
        _or_zero(part, out, groups * width).unflatten(-1, (groups, width))
        for part, width in zip(parts, widths, strict=True)
    ]
    return torch.cat(grouped, dim=-1).flatten(-2)


def has_adapters(gpt: Any) -> bool:
    """Whether ``add_adapters`` was here: the model's checkpoints then hold its adapters alone."""
    return any(hasattr(layer, "lora") for layer in gpt.decoder.layers)


def adapters_only(state: dict[str, Any]) -> dict[str, Any]:
    """The adapters' part of a sharded state dict."""
    return {name: value for name, value in state.items() if _MARK in name}
