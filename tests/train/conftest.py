"""Data sets of two kinds: log-probs near the model's, and far below them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.megatron.runs import write_trajectories


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "near": write_trajectories(folder / "near.jsonl", 30, seed=1),
        "far": write_trajectories(folder / "far.jsonl", 12, seed=2, logprob=-2.0, longest=40),
        "held_out": write_trajectories(folder / "held_out.jsonl", 13, seed=3),
    }
