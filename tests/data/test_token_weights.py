"""token_weights: from the row to the loss, a factor per decision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_rows import a_row, write_jsonl, write_parquet

from pear_megatron import PearConfig
from pear_megatron.data import DataConfig, DataError, PackedBatch, TrajectoryDataset, collate, prepare
from pear_megatron.megatron.forward_step import PearForwardStep
from pear_megatron.ops.statistics import TokenStatistics

Config = Callable[..., DataConfig]
WEIGHTS = [None, 0, 7.0, 0.5, -2.0, 1.0, 0.0, 3.0]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_weights_come_back_and_rows_without_have_ones(write: Any, tmp_path: Path, config: Config) -> None:
    rows = [a_row(n=5), a_row(token_weights=WEIGHTS), a_row(n=6)]
    file = write(tmp_path / f"a.{'jsonl' if write is write_jsonl else 'parquet'}", rows)
    dataset = TrajectoryDataset.open(prepare(config(file)))
    before, weighted, after = dataset
    np.testing.assert_array_equal(weighted.token_weights, np.float32([0, 0, 0, 0.5, -2, 1, 0, 3]))
    for plain in (before, after):
        np.testing.assert_array_equal(plain.token_weights[plain.loss_mask], 1)
    assert dataset.meta["counts"]["token_weights"] == 1


def test_weights_of_one_cost_no_disk_and_change_no_fingerprint(tmp_path: Path, config: Config) -> None:
    plain = prepare(config(write_jsonl(tmp_path / "a.jsonl", [a_row(id="a")])))
    ones = prepare(config(write_jsonl(tmp_path / "b.jsonl", [a_row(id="a", token_weights=[1] * 8)])))
    weighted = prepare(config(write_jsonl(tmp_path / "c.jsonl", [a_row(id="a", token_weights=WEIGHTS)])))
    assert not (plain / "token_weights.npy").exists()
    assert not (ones / "token_weights.npy").exists()
    fingerprints = [TrajectoryDataset.open(folder).fingerprint() for folder in (plain, ones, weighted)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert TrajectoryDataset.open(plain)[0].token_weights is None
    (weighted / "token_weights.npy").unlink()
    with pytest.raises(DataError, match="not a whole data cache"):
        TrajectoryDataset.open(weighted)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0] * 7, "token_weights has 7 entries and input_ids 8"),
        ([0.0] * 3 + [1.0, None, 1.0, 1.0, 1.0], r"token_weights\[4\] = null on a decision"),
        ([0.0] * 3 + [1.0, float("nan"), 1.0, 1.0, 1.0], r"token_weights\[4\] = nan on a decision"),
        ([0.0] * 3 + [1.0, 1e39, 1.0, 1.0, 1.0], r"token_weights\[4\] = 1e\+39 on a decision"),
        ([0.0] * 3 + [1.0, "2", 1.0, 1.0, 1.0], r"token_weights\[4\] = '2'; it must be a list of numbers"),
    ],
)
def test_bad_weights_are_named(weights: list[Any], message: str, tmp_path: Path, config: Config) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl:1: {message}"):
        prepare(config(write_jsonl(tmp_path / "a.jsonl", [a_row(token_weights=weights)])))


def batch_of(folder: Path, config: Config) -> PackedBatch:
    rows = [a_row(n=5), a_row(token_weights=WEIGHTS), a_row(n=6)]
    dataset = TrajectoryDataset.open(prepare(config(write_jsonl(folder / "a.jsonl", rows))))
    return collate(dataset, [[0, 1], [2]], 16, multiple=4)


def test_a_batch_has_them_at_the_labels_and_none_where_nothing_has_any(
    tmp_path: Path, config: Config
) -> None:
    batch = batch_of(tmp_path, config)
    assert batch.token_weights is not None
    assert batch.token_weights[0].tolist() == [0, 0, 1, 1, 0, 0, 0.5, -2, 1, 0, 3, 0, *[0] * 4]
    torch.testing.assert_close(batch.token_weights[1], batch.loss_mask[1].float())
    assert batch.to("meta").token_weights.device.type == "meta"
    plain = TrajectoryDataset.open(prepare(config(write_jsonl(tmp_path / "b.jsonl", [a_row()]))))
    assert collate(plain, [[0]], 16).token_weights is None
    assert collate(plain, [[0]], 16).to("meta").token_weights is None


def test_context_parallel_shards_hold_their_tokens_weights(tmp_path: Path, config: Config) -> None:
    batch = batch_of(tmp_path, config)
    shards = [batch.shard(rank, 2) for rank in range(2)]
    pairs = [
        (int(label), float(weight))
        for shard in shards
        for label, weight in zip(shard.labels.flatten(), shard.token_weights.flatten(), strict=True)
    ]
    expected = zip(batch.labels.flatten().tolist(), batch.token_weights.flatten().tolist(), strict=True)
    assert sorted(pairs) == sorted(expected)


@pytest.mark.parametrize("shape", ["rows", "flat"])
def test_the_loss_is_multiplied_and_the_count_is_not(shape: str, tmp_path: Path, config: Config) -> None:
    batch = batch_of(tmp_path, config)
    logits = torch.randn(*(batch.tokens.shape if shape == "rows" else (1, 32)), 20)
    step = PearForwardStep(PearConfig(variant="none"), vocab_size=20)
    loss, num_tokens, _ = step.loss(logits.clone().requires_grad_(), batch)
    logprobs = logits.view(-1, 20).log_softmax(-1)
    labels = batch.labels.flatten().clamp_min(0)
    chosen = logprobs.gather(1, labels[:, None])[:, 0].where(batch.loss_mask.flatten(), 0)
    torch.testing.assert_close(loss.detach(), -(chosen * batch.token_weights.flatten()).sum())
    assert num_tokens == batch.loss_mask.sum()
    from_logprobs, count, _ = step.loss_of_statistics(TokenStatistics(chosen), batch)
    torch.testing.assert_close(from_logprobs, loss.detach())
    assert count == num_tokens
