"""One mapping serves the local layers, Transformer Engine's and virtual pipeline stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pear_megatron.hf.mapping import LOCAL_NAMES, checkpoint_name, parameters
from pear_megatron.recipe import LoraConfig, ModelConfig, ParallelConfig, TrainConfig
from pear_megatron.recipe.hf_config import model_keys
from tests.distributed import run_ranks
from tests.hf.models import tokens_for
from tests.hf.ranks import leave, load, logprobs


def transformer_engine_spec_of_torch_layers(qk_layernorm: bool) -> Any:
    """mcore's own Transformer Engine layer specification, with torch layers of its parameter names in it."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    class LayerNormLinear(ColumnParallelLinear):
        """A norm and the projection behind it in one, as Transformer Engine has it."""

        def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
            super().__init__(input_size, output_size, config=config, **options)
            self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size))
            self.epsilon = config.layernorm_epsilon

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            normed = torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.epsilon)
            return super().forward(normed, *args, **kwargs)

    class Provider(LocalSpecProvider):
        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return LayerNormLinear

        def layer_norm(self, *args: Any, **kwargs: Any) -> type:
            return WrappedTorchNorm

    gpt_layer_specs.TESpecProvider = Provider
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)


def names_and_keys(model: Any) -> tuple[set[str], set[str]]:
    """Parameters' own names, and the names their tensors have in a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    keys = {shard.key for shard in nested_values(state) if isinstance(shard, ShardedTensor)}
    return {name for name, _ in model.named_parameters()}, keys


def with_adapters(model: Any, keys: Any, layout: Any, tokens: Tensor) -> Tensor | None:
    """Log-probs of the model with random adapters beside its projections."""
    from pear_megatron.megatron.lora import add_adapters

    lora = LoraConfig(rank=4, target_modules=("q_proj", "v_proj", "up_proj", "down_proj"))
    add_adapters(model, keys, lora, layout, seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.arange(parameter.numel()).view_as(parameter).cos()
    return logprobs(model, keys, layout, tokens)


def rank_compares_specs(rank: int, folder: Path, tokens: Tensor) -> dict[str, Any]:
    from megatron.core.models.gpt import gpt_layer_specs

    local, keys, layout = load(folder, 2, 1)
    found: dict[str, Any] = {
        "local logprobs": logprobs(local, keys, layout, tokens),
        "local": names_and_keys(local),
        "local adapted": with_adapters(local, keys, layout, tokens),
        "renamed by mcore": gpt_layer_specs.get_gpt_layer_local_spec(
            normalization="RMSNorm"
        ).submodules.sharded_state_dict_keys_map,
    }
    leave()
    spec = transformer_engine_spec_of_torch_layers(keys.qk_layernorm)
    gpt_layer_specs.get_gpt_layer_local_spec = lambda **_: spec
    fused, keys, layout = load(folder, 2, 1)
    found["fused logprobs"] = logprobs(fused, keys, layout, tokens)
    found["fused"] = names_and_keys(fused)
    found["fused adapted"] = with_adapters(fused, keys, layout, tokens)
    return found


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_transformer_engine_specification_loads_the_same_model(
    hf_models: dict[str, Path], name: str
) -> None:
    found = run_ranks(2, rank_compares_specs, hf_models[name], tokens_for(name))[0]
    (fused_names, fused_keys), (local_names, local_keys) = found["fused"], found["local"]
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in fused_names
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in fused_names
    assert "decoder.layers.0.input_layernorm.weight" in local_names - fused_names
    torch.testing.assert_close(found["fused logprobs"], found["local logprobs"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["fused adapted"], found["local adapted"], atol=1e-5, rtol=0)
    assert (found["local adapted"] - found["local logprobs"]).abs().max() > 0.1
    model = ModelConfig.model_validate(model_keys(hf_models[name]))
    assert fused_keys == local_keys == {parameter.name for parameter in parameters(model)}
    by_mcore = found["renamed by mcore"]
    assert {f"{local}weight": f"{fused}weight" for local, fused in by_mcore.items()} == LOCAL_NAMES


def rank_parameters(rank: int, folder: Path, pp: int, vpp: int | None) -> dict[Any, Tensor]:
    """Every parameter of this rank, by its name in checkpoints and its layer in the whole model."""
    from pear_megatron.hf.weights import HFWeights
    from pear_megatron.megatron.hf_weights import load_weights
    from pear_megatron.megatron.layout import initialize
    from pear_megatron.megatron.model import build_chunks

    model = ModelConfig.model_validate(model_keys(folder))
    parallel = ParallelConfig(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp)
    train = TrainConfig(global_batch_size=pp, precision="fp32")
    layout = initialize(model, parallel, train)
    chunks = build_chunks(model, layout, train)
    with HFWeights(folder, model) as weights:
        load_weights(weights, chunks, layout)
    found = {}
    for chunk in chunks:
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            found[checkpoint_name(name, layers)[:2]] = parameter.detach().clone()
    return found


@pytest.mark.parametrize("name", ["llama3", "llama3-tied"])
def test_virtual_pipeline_stages_get_the_layers_that_they_are(hf_models: dict[str, Path], name: str) -> None:
    whole = run_ranks(1, rank_parameters, hf_models[name], 1, None)[0]
    stages = run_ranks(2, rank_parameters, hf_models[name], 2, 2)
    assert {layer for _, layer in stages[0] if layer is not None} == {0, 2}
    assert {layer for _, layer in stages[1] if layer is not None} == {1, 3}
    if name == "llama3-tied":  # the last stage's copy of the embedding
        whole["output_layer.weight", None] = whole["embedding.word_embeddings.weight", None]
    assert whole.keys() == stages[0].keys() | stages[1].keys()
    for stage in stages:
        for key, parameter in stage.items():
            assert torch.equal(parameter, whole[key]), key
