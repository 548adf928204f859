"""OfflineBatches: every rank its part of a step, from any step on; and what Megatron-LM's arguments must say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron.adapters import megatron_lm
from pear_megatron.adapters.offline_data import OfflineBatches, open_trajectories
from pear_megatron.config import PearConfig
from pear_megatron.data import DataConfig, DataError, TrajectoryDataset
from pear_megatron.data.columns import NO_COLUMNS, Columns
from pear_megatron.errors import RecipeError
from tests.megatron.runs import write_trajectories

SIZES: dict[str, Any] = {"seq_length": 128, "global_batch_size": 8, "micro_batch_size": 2, "seed": 7}


@pytest.fixture
def dataset(tmp_path: Path) -> TrajectoryDataset:
    config = DataConfig(train=[str(write_trajectories(tmp_path / "data.jsonl", 60))], seq_length=128)
    return open_trajectories(config, needs_logprobs=True, vocab_size=1000, columns=NO_COLUMNS)


def seen(batches: OfflineBatches, micro_batches: int) -> list[int]:
    """Trajectories of the next micro-batches."""
    return [int(i) for _ in range(micro_batches) for i in next(batches).trajectory_index if i >= 0]


def test_an_epoch_shows_every_trajectory_once_over_all_ranks(dataset: TrajectoryDataset) -> None:
    ranks = [OfflineBatches(dataset, **SIZES, dp_rank=rank, dp_size=2) for rank in range(2)]
    steps = ranks[0].steps_per_epoch
    assert sorted(i for rank in ranks for i in seen(rank, 2 * steps)) == list(range(60))


def test_batches_hold_the_columns_that_the_loss_reads(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl", 8)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        ids, mask, logprobs = row["input_ids"], row["loss_mask"], row["behavior_logprobs"]
        row["behavior_topk_ids"] = [[i, (i + 1) % 1000] if m else [] for i, m in zip(ids, mask, strict=True)]
        row["behavior_topk_logprobs"] = [[v, -1.0] if m else [] for v, m in zip(logprobs, mask, strict=True)]
        row["reference_logprobs"] = logprobs
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=[str(data)], seq_length=128)
    for pear in (PearConfig(base_loss="kl"), PearConfig(ratio="reference"), PearConfig()):
        columns = Columns.of(pear)
        found = open_trajectories(config, needs_logprobs=True, vocab_size=1000, columns=columns)
        shards = [next(OfflineBatches(found, **SIZES, cp_rank=rank, cp_size=2)) for rank in range(2)]
        for batch in shards:
            assert (batch.behavior_topk is not None) == (pear.base_loss == "kl")
            assert (batch.reference_logprobs is not None) == (pear.ratio == "reference")
            if batch.behavior_topk is not None:
                ids, _ = batch.behavior_topk
                assert ids.shape == (2, 64, 2)
                assert (ids[..., 0][batch.loss_mask] == batch.labels[batch.loss_mask]).all()


def test_it_goes_on_from_the_rows_that_were_consumed(dataset: TrajectoryDataset) -> None:
    whole = OfflineBatches(dataset, **SIZES)
    first, rest = seen(whole, 4), seen(whole, 12)
    assert first != rest[: len(first)]
    assert seen(OfflineBatches(dataset, **SIZES, consumed_samples=8), 12) == rest


def test_an_evaluation_sees_the_same_every_time(dataset: TrajectoryDataset) -> None:
    batches = OfflineBatches(dataset, **SIZES, period=2)
    assert seen(batches, 8) == seen(batches, 8)


def test_context_parallel_ranks_hold_parts_of_the_same_rows(dataset: TrajectoryDataset) -> None:
    whole = OfflineBatches(dataset, **SIZES, cp_rank=0, cp_size=2)
    other = OfflineBatches(dataset, **SIZES, cp_rank=1, cp_size=2)
    one, two = next(whole), next(other)
    assert one.tokens.shape == (2, 64)
    torch.testing.assert_close(one.cu_seqlens, two.cu_seqlens)
    assert not torch.equal(one.position_ids, two.position_ids)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"micro_batch_size": 3}, "8 rows does not divide into micro-batches of 3 on 1"),
        ({"consumed_samples": 4}, "4 rows were consumed, which is no multiple of the global batch of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    changed: dict[str, int], said: str, dataset: TrajectoryDataset
) -> None:
    with pytest.raises(RecipeError, match=said):
        OfflineBatches(dataset, **{**SIZES, **changed})


def test_bad_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"input_ids": [1, 2], "loss_mask": [0, 1]}\n')
    config = DataConfig(train=[str(tmp_path / "bad.jsonl")], seq_length=128)
    with pytest.raises(DataError, match=r"bad.jsonl:1: missing field 'behavior_logprobs'"):
        open_trajectories(config, needs_logprobs=True, vocab_size=1000, columns=NO_COLUMNS)


def arguments(*given: str, **megatron: Any) -> argparse.Namespace:
    """Our arguments as parsed, and Megatron-LM's own."""
    parser = megatron_lm.add_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--pear-data", "data.parquet", *given])
    usual = {
        "calculate_per_token_loss": True, "dataloader_type": "external", "sft": False, "micro_batch_size": 2,
        "transformer_impl": "local", "bf16": False, "vocab_size": 1000,
    }  # fmt: skip
    return argparse.Namespace(**{**vars(args), **usual, **megatron})


def test_the_loss_is_what_the_arguments_say() -> None:
    step = megatron_lm.forward_step(
        arguments("--pear-variant", "block", "--pear-block-size", "8", "--pear-log-ratio-clip", "-0.1", "0.2")
    )
    assert (step.config.variant, step.config.block_size) == ("block", 8)
    assert step.config.log_ratio_clip == (-0.1, 0.2)
    assert (step.vocab_size, step.packed_attention) == (1000, "mask")


@pytest.mark.parametrize(
    ("megatron", "said"),
    [
        ({"calculate_per_token_loss": False}, "PEAR needs --calculate-per-token-loss: packed rows hold different"),
        ({"dataloader_type": "single"}, "PEAR needs --dataloader-type external"),
        ({"cuda_graph_impl": "local"}, "PEAR needs --cuda-graph-impl none: a graph keeps the boundaries"),
        ({"rampup_batch_size": [2, 2, 16]}, "PEAR needs no --rampup-batch-size"),
        ({"sft": True}, "PEAR needs no --sft: its evaluation averages"),
        ({"transformer_impl": "transformer_engine", "bf16": True}, "--micro-batch-size 2: Transformer Engine"),
    ],
)  # fmt: skip
def test_arguments_that_would_spoil_the_loss_are_refused(megatron: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        megatron_lm.forward_step(arguments(**megatron))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": [{"path": "a.jsonl", "name": "a"}, {"path": "b.jsonl", "name": "b"}]}, "names sources"),
        ({"train": ["a.jsonl"], "validation": ["b.jsonl"]}, "data.validation would not be read"),
    ],
)
def test_what_only_our_trainer_reads_is_refused(changed: dict[str, Any], message: str) -> None:
    config = DataConfig.model_validate({"seq_length": 64, **changed})
    with pytest.raises(RecipeError, match=message):
        open_trajectories(config, needs_logprobs=True, vocab_size=1000, columns=NO_COLUMNS)
