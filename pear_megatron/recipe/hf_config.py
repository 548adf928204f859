"""config.json of a Hugging Face checkpoint as ModelConfig keys; what Megatron-Core cannot do is refused."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pear_megatron.errors import RecipeError
from pear_megatron.recipe.sections import ModelConfig
from pear_megatron.schema import describe


@dataclass(frozen=True)
class Family:
    """An architecture of transformers, and how it differs from Llama in Megatron-Core's words."""

    architecture: str
    model_type: str
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    experts: Literal["qwen", "mixtral"] | None = None  # whose names config.json and the weights have for them
    shared_expert: bool = False
    default_norm_epsilon: float = 1e-6
    default_rope_theta: float = 10000.0


FAMILIES = (
    Family("LlamaForCausalLM", "llama"),  # Llama 2 and 3, SmolLM2, DeepSeek-R1-Distill-Llama
    Family("Qwen2ForCausalLM", "qwen2", add_qkv_bias=True),  # Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen
    Family("Qwen3ForCausalLM", "qwen3", qk_layernorm=True, default_head_dim=128),
    Family(
        "MixtralForCausalLM", "mixtral", experts="mixtral", default_norm_epsilon=1e-5, default_rope_theta=1e6
    ),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", qk_layernorm=True, experts="qwen"),  # 30B-A3B, 235B-A22B
    Family("Qwen2MoeForCausalLM", "qwen2_moe", add_qkv_bias=True, experts="qwen", shared_expert=True),
)

# All that Megatron-Core's Llama-3 scaling knows besides its factor (RotaryEmbedding._apply_scaling).
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Keys that change what the model computes, with the values under which it is what Megatron-Core computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "use_mrope": (False, None),
    "quantization_config": (None,),
    "router_jitter_noise": (0, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
    "clip_qkv": (None,),
}


class UnsupportedArchitecture(RecipeError):
    """A model that this package has no mapping for; Megatron-Bridge may have one."""


def model_keys(folder: str | Path) -> dict[str, Any]:
    """The ModelConfig keys that a Hugging Face checkpoint's config.json determines.

    Args:
        folder: the checkpoint's; config.json may be in transformers 4's or 5's format.

    Raises:
        RecipeError: no such folder or file, broken JSON, or a key whose value Megatron-Core has nothing for;
            UnsupportedArchitecture if it is the architecture itself.
    """
    path = Path(folder) / "config.json"
    return _Reader(path, read_config(folder)).model_keys()


def model_config(folder: str | Path) -> ModelConfig:
    """The model that a Hugging Face checkpoint's config.json describes."""
    keys = model_keys(folder)
    try:
        return ModelConfig.model_validate(keys)
    except ValidationError as error:
        raise RecipeError(f"{Path(folder) / 'config.json'}: {describe(error, 'model')}") from error


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder has a tokenizer."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json as it stands; RecipeError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RecipeError(
            f"no Hugging Face checkpoint at {folder}: no such folder; download one first: "
            f"hf download NAME --local-dir {folder}"
        )
    path = folder / "config.json"
    if not path.is_file():
        gguf = ", ".join(sorted(file.name for file in folder.glob("*.gguf")))
        hint = f"; {gguf} has to be made into one first, with transformers (gguf_file=)" if gguf else ""
        raise RecipeError(f"{folder} is not a Hugging Face checkpoint: it has no config.json{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}; is the file whole?") from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def family_of(model: ModelConfig) -> Family:
    """The architecture that computes what the model does; RecipeError if none of those that are mapped does."""
    for key, value in (
        ("position_embedding_type", "rope"),
        ("activation", "swiglu"),
        ("normalization", "RMSNorm"),
        ("add_bias_linear", False),
    ):
        if getattr(model, key) != value:
            raise RecipeError(
                f"model.{key} is {getattr(model, key)!r}: no Hugging Face architecture that is mapped here has it; "
                f"a model to be exported needs {value!r}"
            )
    shared = model.moe_shared_expert_intermediate_size is not None
    for family in FAMILIES:
        if (
            (family.add_qkv_bias, family.qk_layernorm) == (model.add_qkv_bias, model.qk_layernorm)
            and (family.experts is not None) == (model.num_moe_experts is not None)
            and family.shared_expert == shared == model.moe_shared_expert_gate
            and not (family.experts == "mixtral" and model.moe_router_pre_softmax)
        ):
            return family
    if model.num_moe_experts is None:
        raise RecipeError(
            "model.add_qkv_bias and model.qk_layernorm are both true: no Hugging Face architecture that is mapped "
            "here has both (Qwen2 has the first, Qwen3 the second)"
        )
    raise RecipeError(
        "no Hugging Face architecture that is mapped here is a mixture of experts with model.add_qkv_bias "
        f"{model.add_qkv_bias}, model.qk_layernorm {model.qk_layernorm}, model.moe_router_pre_softmax "
        f"{model.moe_router_pre_softmax}, model.moe_shared_expert_intermediate_size "
        f"{model.moe_shared_expert_intermediate_size} and model.moe_shared_expert_gate {model.moe_shared_expert_gate}: "
        "Mixtral has none of them, Qwen3-MoE qk_layernorm, Qwen2-MoE add_qkv_bias and a shared expert with a gate"
    )


class _Reader:
    """config.json's keys, checked one by one; errors name the file and the key."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config

    def model_keys(self) -> dict[str, Any]:
        family = self._family()
        for key, values in _ONLY.items():
            if self.config.get(key, values[0]) not in values:
                self._refuse(key, self.config[key], f"only {values[0]!r} is supported")
        self._check_attention(family)
        heads, hidden = self._integer("num_attention_heads"), self._integer("hidden_size")
        groups = heads if family.model_type == "llama" else None
        rope = self._rope(family.default_rope_theta)
        return {
            "num_layers": self._integer("num_hidden_layers"),
            "hidden_size": hidden,
            "ffn_hidden_size": self._integer("intermediate_size"),
            "num_attention_heads": heads,
            "num_query_groups": self._integer("num_key_value_heads", default=groups, null=heads),
            "kv_channels": self._integer(
                "head_dim", default=family.default_head_dim or hidden // heads, null=hidden // heads
            ),
            "vocab_size": self._integer("vocab_size"),
            "max_position_embeddings": self._integer("max_position_embeddings"),
            "normalization": "RMSNorm",
            "norm_epsilon": self._number(
                "rms_norm_eps", self.config.get("rms_norm_eps", family.default_norm_epsilon)
            ),
            "activation": "swiglu",
            "position_embedding_type": "rope",
            "rotary_base": self._rotary_base(rope),
            "rope_scaling_factor": self._rope_scaling_factor(rope) if rope["rope_type"] != "yarn" else None,
            **self._yarn(rope),
            "add_bias_linear": False,
            "add_qkv_bias": family.add_qkv_bias,
            "qk_layernorm": family.qk_layernorm,
            "share_embeddings_and_output_weights": bool(self.config.get("tie_word_embeddings", False)),
            **self._experts(family),
        }

    def _experts(self, family: Family) -> dict[str, Any]:
        """The keys of a mixture; of a dense model none, so that its checkpoints stay what they were."""
        if family.experts is None:
            return {}
        count = "num_experts" if self.config.get("num_experts") is not None else "num_local_experts"
        mixtral = family.experts == "mixtral"
        keys: dict[str, Any] = {
            "num_moe_experts": self._integer(count),
            "moe_router_topk": self._integer("num_experts_per_tok"),
            "moe_ffn_hidden_size": self._integer("intermediate_size" if mixtral else "moe_intermediate_size"),
            # transformers takes the softmax over all experts; divided by those chosen, it is the softmax over them.
            "moe_router_pre_softmax": not (mixtral or self.config.get("norm_topk_prob", False)),
        }
        if family.shared_expert:
            keys["moe_shared_expert_intermediate_size"] = self._integer("shared_expert_intermediate_size")
            keys["moe_shared_expert_gate"] = True
        return keys

    def _refuse(self, key: str, value: Any, why: str) -> None:
        raise RecipeError(f"{self.path}: {key} is {value!r}; {why}")

    def _family(self) -> Family:
        named = self.config.get("architectures") or []
        for family in FAMILIES:
            if named == [family.architecture] or (
                not named and self.config.get("model_type") == family.model_type
            ):
                return family
        known = ", ".join(family.architecture for family in FAMILIES)
        found = f"architectures is {named!r}" if named else f"model_type is {self.config.get('model_type')!r}"
        raise UnsupportedArchitecture(
            f"{self.path}: {found}; supported are {known}. `pear-megatron convert` turns others into "
            "checkpoints for Megatron-Bridge's loop, where Bridge is installed (pip install 'pear-megatron[bridge]', "
            "needs a GPU)"
        )

    def _integer(self, key: str, *, default: int | None = None, null: int | None = None) -> int:
        """The key's value; ``default`` stands for a missing key, ``null`` for an explicit null."""
        value = self.config.get(key, default)
        if value is None and key in self.config:
            value = null
        if value is None:
            raise RecipeError(f"{self.path}: {key} is missing; is the file whole?")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self._refuse(key, value, "expected a positive integer")
        return int(value)

    def _number(self, key: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            self._refuse(key, value, "expected a positive number")
        return float(value)

    def _check_attention(self, family: Family) -> None:
        """Refuses sliding windows where a layer uses one."""
        if family.model_type == "mixtral" and self.config.get("sliding_window") is not None:
            self._refuse(
                "sliding_window",
                self.config["sliding_window"],
                "every layer would use it; only null is supported",
            )
        if family.model_type == "qwen2_moe" and not self.config.get("qkv_bias", True):
            self._refuse("qkv_bias", self.config["qkv_bias"], "only true is supported")
        layer_types = self.config.get("layer_types")
        if layer_types is not None:
            if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
                self._refuse("layer_types", layer_types, "only a list of 'full_attention' is supported")
            return
        windowed = self.config.get("use_sliding_window") and self.config.get("sliding_window", 4096)
        layers = self._integer("num_hidden_layers")
        if windowed and self.config.get("max_window_layers", 0) < layers:
            self._refuse(
                "use_sliding_window", True, "layers from max_window_layers on would use it; not supported"
            )

    def _rope(self, default_theta: float) -> dict[str, Any]:
        """The rotary parameters in transformers 5's form; version 4 has rope_theta and rope_scaling instead."""
        new, old = (_renamed(self.config.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
        for source in (new, old):
            if not isinstance(source, dict) or any(isinstance(value, dict) for value in source.values()):
                self._refuse("rope_parameters", source, "one set of parameters for all layers is supported")
        if self.config.get("rope_theta") is not None:
            old["rope_theta"] = self.config["rope_theta"]
        merged = {
            "rope_type": "default",
            "rope_theta": default_theta,
            "partial_rotary_factor": 1,
            **old,
            **new,
        }
        for key, value in old.items():
            if merged[key] != value:
                self._refuse(
                    f"rope_parameters.{key}",
                    merged[key],
                    f"the older keys rope_theta and rope_scaling give {value!r}",
                )
        if merged["partial_rotary_factor"] != 1:
            self._refuse(
                "rope_parameters.partial_rotary_factor",
                merged["partial_rotary_factor"],
                "only 1 is supported",
            )
        return merged

    def _rotary_base(self, rope: dict[str, Any]) -> int:
        base = self._number("rope_theta", rope["rope_theta"])
        if base != int(base):
            self._refuse("rope_theta", base, "Megatron-Core's rotary_base is an integer")
        return int(base)

    def _rope_scaling_factor(self, rope: dict[str, Any]) -> float | None:
        kind = rope["rope_type"]
        if kind == "default":
            return None
        if kind != "llama3":
            self._refuse("rope_type", kind, "supported are 'default', 'llama3' and 'yarn'")
        for key, value in LLAMA3_SCALING.items():
            if rope.get(key) != value:
                self._refuse(
                    f"{key} of the llama3 rope scaling", rope.get(key), f"Megatron-Core has {value:g} only"
                )
        return self._number("factor of the llama3 rope scaling", rope.get("factor"))

    def _yarn(self, rope: dict[str, Any]) -> dict[str, Any]:
        """YaRN's keys; transformers' own defaults for what Megatron-Core's betas and attention factor are."""
        names = ("yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings")
        if rope["rope_type"] != "yarn":
            return dict.fromkeys(names)
        factor = self._number("factor of the yarn rope scaling", rope.get("factor"))
        only = {
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": None,
            "mscale_all_dim": None,
            "truncate": True,
            "attention_factor": 0.1 * math.log(factor) + 1 if factor > 1 else 1.0,
        }
        for key, value in only.items():
            found = rope.get(key)
            if found is None or found == value:
                continue
            if value is None or abs(found - value) > 1e-6:
                self._refuse(f"{key} of the yarn rope scaling", found, f"only {value!r} is supported")
        original = rope.get("original_max_position_embeddings") or self.config.get("max_position_embeddings")
        if not isinstance(original, int):
            self._refuse(
                "original_max_position_embeddings of the yarn rope scaling", original, "not a length"
            )
        return dict(zip(names, (factor, original), strict=True))


def _renamed(rope: Any) -> Any:
    """With ``rope_type`` under its own name: ``type`` in the oldest files, and in what model cards tell to paste."""
    if not isinstance(rope, dict) or "type" not in rope:
        return dict(rope) if isinstance(rope, dict) else rope
    kind = rope["type"]
    return {"rope_type": kind, **{key: value for key, value in rope.items() if key != "type"}}
