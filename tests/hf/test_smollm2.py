"""A real model: SmolLM2's log-probs, its greedy words, and its bits, there and back. (Its 9 heads divide by 3.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pear_megatron.data.tokenizer import load_tokenizer, tokenizer_hash
from pear_megatron.megatron.checkpoint.export import export_checkpoint
from tests.distributed import run_ranks
from tests.hf.models import hf_logprobs
from tests.hf.ranks import leave, load, logprobs
from tests.hf.test_round_trip import assert_same_bits

pytestmark = pytest.mark.slow

NEW_TOKENS = 12
CHAT = [
    {"role": "user", "content": "What is the capital of France, and which river does it lie on?"},
    {"role": "assistant", "content": "The capital of France is Paris. It lies on the Seine."},
    {"role": "user", "content": "Name three rivers of Germany."},
]


@pytest.fixture(scope="module")
def prompt(smollm2: Path) -> Tensor:
    """[1, length] a chat through SmolLM2's own template, up to where the assistant answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    return torch.tensor([chat["input_ids"]])


@torch.inference_mode()
def rank_answers(rank: int, folder: Path, tokens: Tensor) -> tuple[Tensor | None, list[int]]:
    """Log-probs of the prompt, and the tokens that Megatron's model finds likeliest after it."""
    model, keys, layout = load(folder, 1, 1)
    found = logprobs(model, keys, layout, tokens)
    length = tokens.shape[1]
    for _ in range(NEW_TOKENS):
        n = tokens.shape[1]
        causal = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1)
        last = model(tokens, torch.arange(n)[None], causal)[0, -1, : keys.vocab_size]
        tokens = torch.cat([tokens, last.argmax()[None, None]], dim=1)
    return found, tokens[0, length:].tolist()


def rank_scores_and_converts(rank: int, folder: Path, tokens: Tensor, output: Path) -> Tensor | None:
    from pear_megatron.megatron.checkpoint.convert import convert_checkpoint

    model, keys, layout = load(folder, 3, 2)
    found = logprobs(model, keys, layout, tokens)
    leave()
    convert_checkpoint(folder, output, tensor_parallel=3, pipeline_parallel=2)
    return found


def test_logprobs_and_greedy_words_are_those_of_transformers(smollm2: Path, prompt: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    found, words = run_ranks(1, rank_answers, smollm2, prompt)[0]
    torch.testing.assert_close(found, hf_logprobs(smollm2, prompt), atol=1e-3, rtol=0)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    assert words == expected[0, prompt.shape[1] :].tolist()


def test_tp3_x_pp2_scores_the_same_and_gives_every_tensor_back(
    smollm2: Path, prompt: Tensor, tmp_path: Path
) -> None:
    results = run_ranks(6, rank_scores_and_converts, smollm2, prompt, tmp_path / "checkpoint", timeout=600)
    torch.testing.assert_close(results[-1], hf_logprobs(smollm2, prompt), atol=1e-3, rtol=0)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", max_shard_size=200 * 10**6)
    assert_same_bits(tmp_path / "out", smollm2)
    hashes = {tokenizer_hash(load_tokenizer(str(folder))) for folder in (smollm2, tmp_path / "out")}
    assert len(hashes) == 1
