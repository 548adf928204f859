"""Small random models of every supported architecture, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # so large that a wrong weight shows in the log-probs
}
# With heads of width 16 and base 10000, one frequency is scaled in part and one fully: it shows at position 1000.
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Frequencies of all three kinds (kept, between, stretched) for heads of width 8 and 24, and twice the original length.
YARN_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
LONG = 1100  # tokens; where the scaling shows

# name -> architecture and what differs from SIZES; tied and untied, vocabularies that need padding: of the first
# and smallest, the second of two tensor-parallel ranks holds nothing else.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-bf16": ("Llama", {"vocab_size": 100, "num_key_value_heads": 4, "dtype": torch.bfloat16}),
    "llama3": ("Llama", {"vocab_size": 301, "head_dim": 16, "rope_parameters": LLAMA3_ROPE}),
    "llama3-tied": ("Llama", {"vocab_size": 131, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"vocab_size": 259, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"vocab_size": 517, "head_dim": 24}),
    "qwen2-yarn": ("Qwen2", {"vocab_size": 259, "rope_parameters": YARN_ROPE}),
    "qwen3-yarn": ("Qwen3", {"vocab_size": 517, "head_dim": 24, "rope_parameters": YARN_ROPE}),
    "qwen3-tied": ("Qwen3", {"vocab_size": 517, "head_dim": 24, "tie_word_embeddings": True}),
}
# Mixtures: both ways of weighing the experts, and a shared one.
_EXPERTS: dict[str, Any] = {"vocab_size": 259, "num_experts_per_tok": 2}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "Qwen3Moe",
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen3-moe-bf16": (
        "Qwen3Moe",
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "dtype": torch.bfloat16},
    ),
    "mixtral": ("Mixtral", {**_EXPERTS, "num_local_experts": 4}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
}
# Without a mapping of ours: for Megatron-Bridge.
UNMAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"vocab_size": 259, "sliding_window": None, "dtype": torch.bfloat16}),
    "gemma2": ("Gemma2", {"vocab_size": 259, "head_dim": 16, "tie_word_embeddings": True}),
}


def save_model(name: str, folder: Path, **changes: Any) -> Path:
    """The random model of that name, saved by transformers; biases and norms are random too."""
    import transformers

    architecture, options = (MODELS | MIXTURES | UNMAPPED)[name]
    config = getattr(transformers, f"{architecture}Config")(**SIZES | options | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.to(config.dtype).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, end: str = "<|im_end|>") -> Path:
    """A tokenizer of bytes and two special tokens (258 tokens), with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_start|>"), AddedToken(end)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def tokens_for(name: str, length: int = 40) -> torch.Tensor:
    """[1, length] random tokens of the model's vocabulary, its last one among them."""
    vocab_size = (MODELS | MIXTURES | UNMAPPED)[name][1]["vocab_size"]
    tokens = torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    tokens[0, 3] = vocab_size - 1
    return tokens


@torch.inference_mode()
def hf_logprobs(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """[1, length - 1] log-probs that transformers gives to each next token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprobs = model(tokens).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
