"""Rank 0 prepares for as long as it takes; the others do not give up."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import torch

from tests.distributed import run_ranks
from tests.megatron.runs import write_trajectories


def rank_opens_what_takes_longer_than_a_collective_may(rank: int, data: Path) -> int:
    from pear_megatron.data import DataConfig, prepare_everywhere, sources

    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    prepare = sources.prepare_sources

    def slowly(*args, **options):  # type: ignore[no-untyped-def]
        time.sleep(3)
        return prepare(*args, **options)

    sources.prepare_sources = slowly
    config = DataConfig(train=str(data), seq_length=64, cache_dir=str(data.parent / "cache"))
    found = prepare_everywhere(config, config.train_sources, require_behavior_logprobs=True, vocab_size=1000)
    return len(found)


def test_preparing_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl", count=5)
    assert run_ranks(2, rank_opens_what_takes_longer_than_a_collective_may, data) == [5, 5]
