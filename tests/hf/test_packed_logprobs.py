"""Trajectories packed into a row get the log-probs that transformers gives each of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.hf.models import MODELS, hf_logprobs, tokens_for
from tests.hf.ranks import leave, load, logprobs

LAYOUTS = [(2, 1), (1, 2)]


def packed_logprobs(model: Any, keys: Any, layout: Any, sequences: list[Tensor]) -> list[Tensor] | None:
    """[1, length - 1] of each sequence [1, length], all of them in one row; None off the last stage."""
    from megatron.core.packed_seq_params import PackedSeqParams

    lengths = [s.shape[1] for s in sequences]
    tokens = torch.cat(sequences, dim=1)
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    found = logprobs(model, keys, layout, tokens, positions, packed)
    if found is None:
        return None
    return [found[:, i : i + n - 1] for i, n in zip(ends[:-1].tolist(), lengths, strict=True)]


def rank_packed(
    rank: int, cases: dict[str, tuple[Path, list[Tensor]]], layouts: list[tuple[int, int]]
) -> dict[tuple[str, int, int], list[Tensor] | None]:
    found = {}
    for tp, pp in layouts:
        for name, (folder, sequences) in cases.items():
            found[name, tp, pp] = packed_logprobs(*load(folder, tp, pp), sequences)
            leave()
    return found


def test_every_family_on_every_layout(hf_models: dict[str, Path]) -> None:
    def sequences(name: str) -> list[Tensor]:
        tokens = tokens_for(name)
        return [tokens, tokens.flip(1)[:, :17], tokens[:, 5:30]]

    cases = {name: (folder, sequences(name)) for name, folder in hf_models.items()}
    assert cases.keys() == MODELS.keys()
    ours = run_ranks(2, rank_packed, cases, LAYOUTS)[-1]
    for (name, tp, pp), found in ours.items():
        for mine, tokens in zip(found, cases[name][1], strict=True):
            expected = hf_logprobs(cases[name][0], tokens)
            torch.testing.assert_close(
                mine, expected, atol=2e-5, rtol=0, msg=lambda text, at=(name, tp, pp): f"{at}: {text}"
            )


@pytest.mark.slow
def test_smollm2s_chats_in_one_row(smollm2: Path) -> None:
    """A real model, of 9 query heads and 3 key-value heads: on one rank, and on three tensor-parallel ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [
        "The capital of France is Paris. It lies on the Seine.",
        "def fib(n):\n    return n if n < 2 else",
    ]
    sequences = [torch.tensor([tokenizer(text)["input_ids"]]) for text in [*texts, texts[0][::-1]]]
    expected = [hf_logprobs(smollm2, tokens) for tokens in sequences]
    for tp in (1, 3):
        found = run_ranks(tp, rank_packed, {"smollm2": (smollm2, sequences)}, [(tp, 1)], timeout=600)[-1]
        for ours, theirs in zip(found["smollm2", tp, 1], expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
