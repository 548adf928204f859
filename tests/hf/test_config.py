"""config.json is read as transformers means it, in both of its formats, and what is not supported is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pear_megatron.errors import RecipeError
from pear_megatron.hf.config_file import config_json
from pear_megatron.recipe import ModelConfig, load_recipe
from pear_megatron.recipe.hf_config import has_tokenizer, model_keys

RECIPES = Path(__file__).parents[2] / "recipes" / "sft"

# As they stand in the model repositories, shortened to what matters; version 4's format.
LLAMA31: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GONE = object()


def write(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    changed = {key: value for key, value in (config | changes).items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


def test_llama_3_1(tmp_path: Path) -> None:
    assert model_keys(write(tmp_path, LLAMA31)) == {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "activation": "swiglu",
        "position_embedding_type": "rope",
        "rotary_base": 500000,
        "rope_scaling_factor": 8.0,
        "yarn_rotary_scaling_factor": None,
        "yarn_original_max_position_embeddings": None,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "share_embeddings_and_output_weights": False,
    }


def test_what_a_mixtral_does_not_say_is_transformers_default(tmp_path: Path) -> None:
    config = LLAMA31 | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
    }
    gone = dict.fromkeys(("rms_norm_eps", "rope_theta", "rope_scaling"), GONE)
    keys = model_keys(write(tmp_path, config, num_experts_per_tok=2, **gone))
    assert (keys["norm_epsilon"], keys["rotary_base"]) == (1e-5, 1_000_000)


def test_qwen_2_5_has_biases_and_qwen_3_norms_and_its_own_head_size(tmp_path: Path) -> None:
    qwen25 = model_keys(write(tmp_path, QWEN25))
    assert (qwen25["add_qkv_bias"], qwen25["qk_layernorm"], qwen25["kv_channels"]) == (True, False, 128)
    assert qwen25["rope_scaling_factor"] is None
    qwen3 = model_keys(write(tmp_path, QWEN3))
    assert (qwen3["add_qkv_bias"], qwen3["qk_layernorm"], qwen3["kv_channels"]) == (False, True, 128)
    assert qwen3["share_embeddings_and_output_weights"]
    assert model_keys(write(tmp_path, QWEN3, head_dim=GONE))["kv_channels"] == 128


def test_transformers_5_writes_rope_parameters_instead(tmp_path: Path) -> None:
    four = model_keys(write(tmp_path, LLAMA31))
    rope = LLAMA31["rope_scaling"] | {"rope_theta": 500000.0}
    five = write(tmp_path, LLAMA31, rope_scaling=GONE, rope_theta=GONE, rope_parameters=rope)
    assert model_keys(five) == four
    both = write(tmp_path, LLAMA31, rope_parameters=rope)
    assert model_keys(both) == four


def test_llama_1_has_no_key_for_its_key_and_value_heads(tmp_path: Path) -> None:
    assert model_keys(write(tmp_path, LLAMA31, num_key_value_heads=GONE))["num_query_groups"] == 32
    with pytest.raises(RecipeError, match="num_key_value_heads is missing"):
        model_keys(write(tmp_path, QWEN25, num_key_value_heads=GONE))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA31, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        (LLAMA31, {"attention_bias": True}, "attention_bias is True"),
        (LLAMA31, {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA31, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        (QWEN25, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type is 'dynamic'; supported are"),
        (QWEN3, {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1000000}}, "rope_type is 'longrope'"),
        (QWEN25, {"rope_scaling": {"type": "yarn"}}, "factor of the yarn rope scaling is None"),
        (QWEN25, {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 16}}, "beta_fast of the yarn.* is 16"),
        (QWEN25, {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale of the yarn.* is 0.7"),
        (QWEN25, {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate of the yarn"),
        (QWEN25, {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.0}}, "attention_factor of"),
        (LLAMA31, {"rope_scaling": LLAMA31["rope_scaling"] | {"low_freq_factor": 2.0}}, "low_freq_factor.*has 1 only"),
        (LLAMA31, {"rope_scaling": LLAMA31["rope_scaling"] | {"high_freq_factor": 8.0}}, "high_freq_factor.*has 4"),
        (
            LLAMA31,
            {"rope_scaling": LLAMA31["rope_scaling"] | {"original_max_position_embeddings": 4096}},
            "original_max_position_embeddings.*is 4096.*has 8192 only",
        ),
        (LLAMA31, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters.*older keys"),
        (
            QWEN25,
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_parameters.rope_type.*older keys",
        ),
        (LLAMA31, {"rope_theta": 10000.5}, "rope_theta is 10000.5.*integer"),
        (LLAMA31, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set of parameters"),
        (QWEN25, {"use_sliding_window": True, "max_window_layers": 20}, "use_sliding_window"),
        (QWEN25, {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": GONE}, "use_sliding_window"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*sliding_attention"),
        (QWEN25, {"use_mrope": True}, "use_mrope is True"),
        (QWEN25, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LLAMA31, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (QWEN3, {"architectures": ["Qwen3NextForCausalLM"]}, "Qwen3NextForCausalLM.*Megatron-Bridge"),
        (LLAMA31, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (LLAMA31, {"architectures": GONE, "model_type": "gpt2"}, "model_type is 'gpt2'"),
        (LLAMA31, {"hidden_size": "4096"}, "hidden_size is '4096'; expected a positive integer"),
        (LLAMA31, {"num_hidden_layers": GONE}, "num_hidden_layers is missing"),
    ],
)  # fmt: skip
def test_what_megatron_has_nothing_for_is_refused_by_its_key(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        model_keys(write(tmp_path, config, **changes))
    assert str(tmp_path / "config.json") in str(raised.value)


def test_a_sliding_window_that_no_layer_uses_is_fine(tmp_path: Path) -> None:
    config = write(tmp_path, QWEN25, use_sliding_window=True, max_window_layers=28)
    assert model_keys(config)["num_layers"] == 28


def test_folders_without_a_readable_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such folder; download one first"):
        model_keys(tmp_path / "nothing")
    with pytest.raises(RecipeError, match="has no config.json"):
        model_keys(tmp_path)
    (tmp_path / "model.Q4.gguf").touch()
    with pytest.raises(RecipeError, match="model.Q4.gguf has to be made into one"):
        model_keys(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31)[:100])
    with pytest.raises(RecipeError, match="config.json cannot be read.*is the file whole"):
        model_keys(tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_yarn_is_read_with_its_original_length_and_makes_room_for_longer_rows(tmp_path: Path) -> None:
    names = ("yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings", "rope_scaling_factor")
    for scaling in (YARN, {"type": "yarn", "factor": 4.0}, YARN | {"attention_factor": 1.1386294361119891}):
        keys = model_keys(write(tmp_path, QWEN25, rope_scaling=scaling))
        assert [keys[name] for name in names] == [4.0, 32768, None]
        assert ModelConfig(**keys).longest_context == 4 * 32768
    with pytest.raises(ValueError, match="go together"):
        ModelConfig(**(keys | {"yarn_original_max_position_embeddings": None}))
    with pytest.raises(ValueError, match="without rope_scaling_factor"):
        ModelConfig(**(keys | {"rope_scaling_factor": 8.0}))


@pytest.mark.parametrize(
    "config",
    [LLAMA31, QWEN25, QWEN3, QWEN25 | {"rope_scaling": YARN}],
    ids=["llama", "qwen2", "qwen3", "qwen2-yarn"],
)
def test_a_config_made_from_the_keys_says_the_same_to_transformers(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    keys = model_keys(write(tmp_path, config))
    made = tmp_path / "made"
    made.mkdir()
    write(made, config_json(ModelConfig(**keys), "bf16", tmp_path / "no-assets"))
    assert model_keys(made) == keys
    theirs, ours = (transformers.AutoConfig.from_pretrained(folder) for folder in (tmp_path, made))
    assert ours.dtype == "bfloat16" or str(ours.dtype) == "torch.bfloat16"
    for key in (*config.keys() & ours.to_dict().keys(), "rope_parameters"):
        if key not in ("bos_token_id", "eos_token_id", "sliding_window", "max_window_layers", "torch_dtype"):
            assert getattr(ours, key) == getattr(theirs, key), key


def test_the_recipes_small_models_are_llamas_and_learned_positions_are_nothing_that_is_mapped() -> None:
    tiny = load_recipe(RECIPES / "tiny.yaml", ["data.train=x"]).model
    config = config_json(tiny, "fp32", Path("no-assets"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] is None  # without a tokenizer there is none, and Llama's default is 2
    stretches = load_recipe(RECIPES / "stretches.yaml").model
    assert config_json(stretches, "fp32", Path("no-assets"))["architectures"] == ["LlamaForCausalLM"]
    learned = tiny.model_copy(update={"position_embedding_type": "learned_absolute"})
    with pytest.raises(RecipeError, match="model.position_embedding_type is 'learned_absolute'"):
        config_json(learned, "fp32", Path("no-assets"))
    both = tiny.model_copy(update={"add_qkv_bias": True, "qk_layernorm": True})
    with pytest.raises(RecipeError, match="both true"):
        config_json(both, "fp32", Path("no-assets"))
    gelu = tiny.model_copy(update={"activation": "gelu"})
    with pytest.raises(RecipeError, match="model.activation is 'gelu'"):
        config_json(gelu, "fp32", Path("no-assets"))


def test_a_recipe_takes_its_model_from_the_folder_and_its_tokenizer_too(tmp_path: Path) -> None:
    folder = write(tmp_path, QWEN3)
    overrides = [f"model.hf={folder}", "data.train=x", "output_dir=y"]
    recipe = load_recipe(RECIPES / "base.yaml", overrides)
    assert (recipe.model.num_layers, recipe.model.qk_layernorm) == (28, True)
    assert recipe.data.tokenizer is None
    assert not has_tokenizer(folder)
    (folder / "tokenizer.json").touch()
    assert load_recipe(RECIPES / "base.yaml", overrides).data.tokenizer == str(folder)
    own = load_recipe(RECIPES / "base.yaml", [*overrides, "data.tokenizer=another"])
    assert own.data.tokenizer == "another"
    with pytest.raises(RecipeError, match="model.num_layers is 12, but model.hf .* has 28"):
        load_recipe(RECIPES / "base.yaml", [*overrides, "+model.num_layers=12"])
