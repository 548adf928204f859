"""Stands in for mbridge, which needs Transformer Engine: it gives verl's Megatron engine a real GPTModel on CPU.

verl asks a bridge for the model's configuration, for the model wrapped in DDP, and to load a Hugging Face folder.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

# With any value: layers without attention, which context parallelism and packed rows can run without TE.
NO_ATTENTION = "PEAR_TEST_NO_ATTENTION"


class AutoBridge:
    """What verl calls of mbridge's class of this name."""

    def __init__(self, hf_config: Any) -> None:
        from megatron.core import parallel_state as mpu

        from pear_megatron.megatron.model import transformer_config
        from pear_megatron.recipe import ModelConfig, TrainConfig
        from pear_megatron.recipe.hf_config import model_keys

        self.model = ModelConfig.model_validate(model_keys(hf_config._name_or_path))
        self.layout = types.SimpleNamespace(
            device=types.SimpleNamespace(type="cpu"),
            tp_size=mpu.get_tensor_model_parallel_world_size(),
            pp_size=mpu.get_pipeline_model_parallel_world_size(),
            cp_size=mpu.get_context_parallel_world_size(),
            tp_group=mpu.get_tensor_model_parallel_group(),
            vpp_size=1,
            sequence_parallel=False,
            tp_comm_overlap=False,
        )
        train = TrainConfig.model_validate({"global_batch_size": 1, "precision": "fp32"})
        self.config = transformer_config(self.model, self.layout, train)
        self.config.calculate_per_token_loss = False  # as mbridge has it
        self.config.variable_seq_lengths = True

    @classmethod
    def from_config(cls, hf_config: Any, dtype: Any = None) -> AutoBridge:
        return cls(hf_config)

    def set_extra_args(self, **settings: Any) -> None:
        if "calculate_per_token_loss" in settings:
            self.config.calculate_per_token_loss = settings["calculate_per_token_loss"]

    def get_model(self, *, ddp_config: dict[str, Any], **_: Any) -> list[Any]:
        from megatron.core import parallel_state as mpu
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt import gpt_layer_specs as specs
        from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

        class Causal(GPTModel):
            """verl's attention mask marks the padding at each row's end, which local attention does not take."""

            def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
                return super().forward(*args, attention_mask=None, **kwargs)

        self.config.bf16 = (
            False  # verl's engine takes no float32 model by name, and rounding would hide mistakes
        )
        spec = specs.get_gpt_layer_local_spec(normalization=self.model.normalization)
        if NO_ATTENTION in os.environ:
            spec.submodules.input_layernorm = spec.submodules.self_attention = IdentityOp
            spec.submodules.self_attn_bda = IdentityFuncOp
        gpt = Causal(
            config=self.config,
            transformer_layer_spec=spec,
            vocab_size=self.model.vocab_size,
            max_sequence_length=self.model.max_position_embeddings,
            pre_process=mpu.is_pipeline_first_stage(),
            post_process=mpu.is_pipeline_last_stage(),
            parallel_output=True,
            share_embeddings_and_output_weights=self.model.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=self.model.rotary_base,
        )
        return [DistributedDataParallel(self.config, DistributedDataParallelConfig(**ddp_config), gpt)]

    def load_weights(self, module: Any, path: str) -> None:
        from pear_megatron.hf.weights import HFWeights
        from pear_megatron.megatron.hf_weights import load_weights

        with HFWeights(path, self.model) as weights:
            load_weights(weights, module, self.layout)

    def save_weights(self, *args: Any, **settings: Any) -> None:
        """The Hugging Face folder that verl keeps beside its checkpoint is not what is tested."""


def install() -> None:
    """Makes ``import mbridge`` find this."""
    from megatron.core.transformer import TransformerConfig  # noqa: F401  # Megatron-Core first

    modules = {name: types.ModuleType(name) for name in (
        "mbridge", "mbridge.core", "mbridge.utils", "mbridge.utils.post_creation_callbacks"
    )}  # fmt: skip
    modules["mbridge"].AutoBridge = AutoBridge  # type: ignore[attr-defined]
    callbacks = modules["mbridge.utils.post_creation_callbacks"]
    callbacks.freeze_moe_router = callbacks.make_value_model = None  # type: ignore[attr-defined]
    sys.modules |= modules
