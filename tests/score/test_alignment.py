"""Scored by the policy itself, data has log ratios of 0 in training: nothing is shifted on the whole way."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pear_megatron import PearConfig, importance_weights, pear_loss, vocab_parallel_logprob
from pear_megatron.data import collate
from tests.distributed import run_ranks
from tests.score.jobs import opened, rows_of_ids, run_job, write_jsonl
from tests.score.tiny import without_tokenizer

GAMMA = 0.9


def rank_scores_and_trains(rank: int, folder: Path, model: Path, tensor_parallel: int) -> None:
    from megatron.core import parallel_state

    from pear_megatron.megatron.checkpoint.load_model import load_for_inference

    os.environ["RANK"] = str(rank)
    scored = folder / "scored.parquet"
    run_job(
        folder / "in.jsonl", scored, model, backend="megatron", tensor_parallel=tensor_parallel, chunk_rows=5
    )
    parallel_state.destroy_model_parallel()

    dataset = opened(scored, seq_length=64, cache_dir=str(folder / f"cache-{rank}"))
    batch = collate(dataset, [[3, 0, 7], [5, 1]], 64)  # several trajectories a row, and padding
    policy, keys, layout = load_for_inference(model, tensor_parallel=tensor_parallel, precision="fp32")
    logits = policy(batch.tokens, batch.position_ids, batch.attention_mask())  # [B, S, V/tp]
    split = {"tp_group": layout.tp_group, "vocab_size": keys.vocab_size}
    pear = PearConfig(gamma=GAMMA)
    _, num_tokens, report = pear_loss(
        logits, batch.labels, batch.behavior_logprobs, batch.loss_mask, batch.cu_seqlens, pear, **split
    )
    assert int(num_tokens) == sum(int(dataset[i].loss_mask.sum()) for i in (3, 0, 7, 5, 1))
    log_ratio, count = report["pear/log_ratio"].tolist()
    assert count == int(num_tokens)
    assert abs(log_ratio / count) < 1e-6
    assert report["pear/ratio_clipped_low"][0] == report["pear/ratio_clipped_high"][0] == 0

    logprobs = vocab_parallel_logprob(logits, batch.labels, mask=batch.loss_mask, **split)
    torch.testing.assert_close(logprobs, batch.behavior_logprobs, atol=5e-6, rtol=1e-5)
    flat = logprobs.flatten(), batch.behavior_logprobs.flatten(), batch.loss_mask.flatten()
    weights, _ = importance_weights(*flat, batch.cu_seqlens, pear)
    expected = []
    for mask in flat[2].tensor_split(batch.cu_seqlens[1:-1].tolist()):
        to_the_end = mask.flip(0).cumsum(0).flip(0) - 1  # decisions after each one: T - t
        expected.append(torch.where(mask, GAMMA ** to_the_end.float(), 0.0))
    torch.testing.assert_close(weights, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_data_scored_by_the_policy_itself_has_log_ratios_of_zero(tiny_llama: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", rows_of_ids(12))
    model = without_tokenizer(tiny_llama, tmp_path / "model")
    run_ranks(2, rank_scores_and_trains, tmp_path, model, 2)
