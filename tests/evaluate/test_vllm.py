"""eval --engine vllm: the real vLLM, where it is installed (its build for CPUs will do), against transformers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pear_megatron.errors import EvalError
from pear_megatron.evaluate.engines import load_engine
from pear_megatron.evaluate.sampling import Sampling
from tests.smollm2 import smollm2_folder

pytest.importorskip("vllm", reason="vLLM is not installed")

QUESTIONS = ["What is 3+4?", "Name a colour of the sky, in one word.", "Write one sentence about cats."]
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2, with sampling defaults of its own that have to stay out."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by default nearly all of the memory
    folder = shutil.copytree(smollm2_folder(), tmp_path_factory.mktemp("models") / "smollm2")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({**config, "do_sample": True, "top_k": 1, "repetition_penalty": 5.0})
    )
    return folder


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
    ]


def test_greedy_responses_are_those_of_transformers(model: Path, prompts: list[list[int]]) -> None:
    greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=24)
    ours = load_engine("transformers", model, [END], greedy, "fp32").generate(prompts, [1, 2, 3])
    theirs = load_engine("vllm", model, [END], greedy, "fp32").generate(prompts, [1, 2, 3])
    assert theirs == ours
    assert {completion.truncated for completion in ours} == {True, False}
    assert all(c.truncated == (c.tokens[-1] != END) for c in ours)


def test_samples_are_their_seeds_and_end_at_the_end_tokens(model: Path, prompts: list[list[int]]) -> None:
    engine = load_engine("vllm", model, [END, 30], Sampling(1.0, 0.95, 24), "fp32")  # 30: "."
    found = engine.generate(prompts, [1, 2, 3])
    assert engine.generate(prompts[::-1], [3, 2, 1])[::-1] == found
    assert engine.generate(prompts, [4, 5, 6]) != found
    several = engine.generate([prompts[2]] * 20, list(range(20)))
    assert len({tuple(c.tokens) for c in several}) > 10  # top_k is not 1
    assert {30, END} >= {c.tokens[-1] for c in several if not c.truncated} != set()
    assert not any({30, END} & set(c.tokens[:-1]) for c in several)


def test_a_model_that_cannot_be_loaded_is_named(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(EvalError, match=f"vLLM cannot load {broken}.*--engine transformers"):
        load_engine("vllm", broken, [END], Sampling(0.0, 1.0, 4), "fp32")
