"""Trajectories packed into a row get the log-probs that transformers gives each of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.hf.models import MODELS, hf_logprobs, tokens_for
from tests.hf.ranks import leave, load

LAYOUTS = [(2, 1), (1, 2)]


@torch.inference_mode()
def packed_logprobs(model: Any, keys: Any, layout: Any, sequences: list[Tensor]) -> list[Tensor] | None:
    """[1, length - 1] of each sequence [1, length], all of them in one row; None off the last stage."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from pear_megatron import vocab_parallel_logprob

    lengths = [s.shape[1] for s in sequences]
    tokens = torch.cat(sequences, dim=1)
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def step(iterator: Any, model: Any) -> Any:
        output = model(tokens, positions, None, packed_seq_params=packed)

        def score(logits: Tensor) -> Any:
            found = vocab_parallel_logprob(
                logits[:, :-1], tokens[:, 1:], tp_group=layout.tp_group, vocab_size=keys.vocab_size
            )
            return found.sum(), torch.tensor(1), {"logprobs": found}

        return output, score

    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([None]),
        model=[model],
        num_microbatches=1,
        seq_length=tokens.shape[1],
        micro_batch_size=1,
        forward_only=True,
    )
    if not layout.is_last_stage:
        return None
    starts = ends[:-1].tolist()
    return [results[0]["logprobs"][:, i : i + n - 1].clone() for i, n in zip(starts, lengths, strict=True)]


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
        for logprobs, tokens in zip(found, cases[name][1], strict=True):
            expected = hf_logprobs(cases[name][0], tokens)
            torch.testing.assert_close(
                logprobs, expected, atol=2e-5, rtol=0, msg=lambda text, at=(name, tp, pp): f"{at}: {text}"
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
        for logprobs, theirs in zip(found["smollm2", tp, 1], expected, strict=True):
            torch.testing.assert_close(logprobs, theirs, atol=1e-4, rtol=0)
