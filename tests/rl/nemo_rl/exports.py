"""Hugging Face folders that have everything but weights: what a start of GRPO looks at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "user", "assistant", "1", "2", "+", "?", "[UNK]"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584,
    "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 131072, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip


def write_export(
    folder: Path, *, eos: str = "<|im_end|>", template: str | None = CHAT_TEMPLATE, **config: Any
) -> Path:
    """A Qwen2.5-7B by its config.json, save for ``config``."""
    folder.mkdir(parents=True, exist_ok=True)
    special = [
        {"id": i, "content": TOKENS[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i in range(3)
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(TOKENS)}, "unk_token": "[UNK]"},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": template}
    for name, content in (
        ("config.json", {**QWEN_7B, **config}),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", {key: value for key, value in settings.items() if value is not None}),
    ):
        (folder / name).write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(bytes(8))
    return folder
