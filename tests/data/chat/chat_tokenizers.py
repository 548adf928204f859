"""SmolLM2's BPE with the special tokens and the chat templates of other model families, as TRL ships these."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

_BAR = "\uff5c"  # DeepSeek's
_TOKENS = re.compile(
    r"<\|[\w\"]+\|?>|<\w+\|>|<(?:start|end)_of_\w+>|</?think>|</?tool_(?:call|response)>|</s>|"
    + f"<{_BAR}[^<>]+{_BAR}>"
)
_PLAIN = re.compile(rf"</?(think|tool_call|tool_response)>|<{_BAR}(?!begin▁of|end▁of).*")
_EOS = {
    "deepseek": f"<{_BAR}end▁of▁sentence{_BAR}>",
    "llama3": "<|eot_id|>",
    "qwen": "<|im_end|>",
    "llava": "</s>",
}


def templates() -> dict[str, str]:
    """Every chat template that TRL ships, by name."""
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return {file.stem: file.read_text() for file in sorted(folder.glob("*.jinja"))}


class Families:
    """Makes tokenizers.

    Args:
        plain: SmolLM2's own tokenizer; it is copied.
    """

    def __init__(self, plain: Any) -> None:
        from tokenizers import AddedToken

        self.templates = templates()
        self._smollm2 = plain
        self._all = copy.deepcopy(plain)
        found = dict.fromkeys(["<bos>", *_EOS.values(), *_TOKENS.findall("".join(self.templates.values()))])
        self._all.add_tokens(
            [AddedToken(text, special=not _PLAIN.fullmatch(text), normalized=False) for text in found]
        )

    def __call__(self, name: str) -> Any:
        """The tokenizer with the template of that name; ``smollm2`` is SmolLM2's own."""
        if name == "smollm2":
            return self._smollm2
        tokenizer = copy.copy(self._all)
        tokenizer.chat_template = self.templates[name]
        tokenizer.bos_token = "<bos>"
        tokenizer.eos_token = next(
            (eos for key, eos in _EOS.items() if name.startswith(key)), "<|endoftext|>"
        )
        return tokenizer


def shown(tokenizer: Any, encoded: Any) -> str:
    """The text of a trajectory, decisions in [[ ]]."""
    text, run, inside = "", [], False
    for token, decision in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if decision != inside:
            text += tokenizer.decode(run) + ("[[" if decision else "]]")
            run, inside = [], decision
        run.append(token)
    return text + tokenizer.decode(run) + ("]]" if inside else "")
