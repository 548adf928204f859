"""Loading a Hugging Face tokenizer, and the hash that tells two of them apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pear_megatron.data.errors import DataError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_tokenizer(name_or_path: str) -> Any:
    """Load the tokenizer of a Hugging Face model or local folder.

    A folder without tokenizer files and with a single ``.gguf`` file gives the tokenizer inside it.

    Raises:
        ImportError: transformers is missing (extra ``hf``).
        DataError: there is no such tokenizer, or it is not a fast one.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            "data.tokenizer needs Hugging Face transformers; pip install 'pear-megatron[hf]'"
        ) from error
    options: dict[str, Any] = {"trust_remote_code": False}
    path = Path(name_or_path).expanduser()
    if path.is_dir() and not any((path / name).exists() for name in _TOKENIZER_FILES):
        gguf = sorted(path.glob("*.gguf"))
        if len(gguf) != 1:
            raise DataError(
                f"data.tokenizer = {name_or_path!r}: the folder has no tokenizer.json and {len(gguf)} .gguf "
                "files; name a folder with a tokenizer, or with a single .gguf file"
            )
        options["gguf_file"] = gguf[0].name
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.exists() else name_or_path, **options)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise DataError(
            f"data.tokenizer = {name_or_path!r} was not found: it is no local folder with a tokenizer, and "
            f"the Hugging Face hub did not give it ({first_line}); without network (HF_HUB_OFFLINE=1) name "
            "a local folder, or download it first: hf download NAME"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"data.tokenizer = {name_or_path!r} has no fast (Rust) tokenizer; convert it: "
            "AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(FOLDER)"
        )
    return tokenizer


def read_chat_template(path: str | None) -> str | None:
    """The text of ``data.chat_template``, None where it is not given; DataError if the file cannot be read."""
    if path is None:
        return None
    try:
        template = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template = {path!r} cannot be read ({error}); name a text file with a Jinja template"
        ) from error
    if not template.strip():
        raise DataError(f"data.chat_template = {path!r} is empty; name a text file with a Jinja template")
    return template


def tokenizer_hash(
    tokenizer: Any, chat_template: str | None = None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> str:
    """Sixteen hex characters that differ when text would become other token ids.

    SHA-256 over the fast tokenizer's serialised form, without its padding and truncation state, over the chat
    template, the tokenizer's own unless ``chat_template`` is given, and over ``chat_template_kwargs``, if there are
    any; the same in every process and after ``save_pretrained`` and loading again (docs/method.md,
    Where it goes wrong).
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    parts = [state, tokenizer.chat_template if chat_template is None else chat_template]
    if chat_template_kwargs:
        parts.append(dict(chat_template_kwargs))
    content = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
