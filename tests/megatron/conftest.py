"""One reference run that the others are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron.runs import train, write_trajectories


@pytest.fixture(scope="session")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trajectories(tmp_path_factory.mktemp("data") / "trajectories.jsonl")


@pytest.fixture(scope="session")
def one_rank_folder(tmp_path_factory: pytest.TempPathFactory, trajectories: Path) -> Path:
    """Six steps on one process, saved after three."""
    folder = tmp_path_factory.mktemp("runs") / "one_rank"
    train(folder, trajectories, 1, "checkpoint.save_interval=3")
    return folder


@pytest.fixture(scope="session")
def one_rank(one_rank_folder: Path) -> list[dict[str, Any]]:
    from tests.megatron.runs import metrics

    return metrics(one_rank_folder)
