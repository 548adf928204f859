"""A small real tokenizer: fast, over bytes, with a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_byte_tokenizer(chat_template: str | None = CHATML, *, other_words: bool = False) -> Any:
    """The tokenizer, 258 tokens; with ``other_words`` it has other ids for the same bytes."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=other_words)
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def save_byte_tokenizer(folder: Path, *, other_words: bool = False, other_template: bool = False) -> Path:
    """Saves it; another one with other ids for the same bytes, or with another template."""
    template = CHATML.replace("\n", " ") if other_template else CHATML
    make_byte_tokenizer(template, other_words=other_words).save_pretrained(folder)
    return folder
