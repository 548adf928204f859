"""LoRA's matrices: their names and shapes in PEFT's files and in our checkpoints, and the folder that PEFT opens."""

from __future__ import annotations

from typing import Any

from pear_megatron.hf.mapping import Parameter, Part, parameters
from pear_megatron.recipe import LoraConfig, ModelConfig

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def projection_of(part: Part) -> str | None:
    """``q_proj`` of ``model.layers.3.self_attn.q_proj.weight``; None where the tensor is no projection's weight."""
    name = part.name.removesuffix(".weight").rsplit(".", 1)[-1]
    return name if name.endswith("_proj") and part.name.endswith(".weight") else None


def lora_parameters(model: ModelConfig, lora: LoraConfig) -> list[Parameter]:
    """A and B of every adapted projection, as our checkpoints hold them; the parts have PEFT's names.

    A is [rank, in], and B [out, rank]; tensor-parallel ranks share the side of the projection that they share.
    """
    found = []
    for parameter in parameters(model):
        for part in parameter.parts:
            projection = projection_of(part)
            if projection is None or projection not in lora.target_modules:
                continue
            rows, columns = part.shape
            stem = _PEFT_PREFIX + part.name.removesuffix(".weight")
            for matrix, shape, split in (
                ("lora_A", (lora.rank, columns), 1 if parameter.split == 1 else None),
                ("lora_B", (rows, lora.rank), 0 if parameter.split == 0 else None),
            ):
                name = f"decoder.layers.lora.{projection}.{matrix}"
                found.append(
                    Parameter(name, parameter.layer, (Part(f"{stem}.{matrix}.weight", shape),), split)
                )
    return found


def peft_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        lora: the run's.
        base: folder or name of the model that the adapters belong to.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
