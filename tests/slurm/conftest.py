"""One Slurm of two nodes for all tests, and what a run gives without Slurm."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.megatron.ranks import train_runs
from tests.megatron.runs import write_trajectories
from tests.slurm.cluster import SlurmCluster, missing_programs, slurm_cluster
from tests.slurm.workspace import OVERRIDES, Steps, Workspace, steps_of


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    if missing := missing_programs():
        pytest.skip(f"needs Slurm (no {missing[0]} here): apt-get install slurm-wlm munge")
    if torch.cuda.is_available():
        pytest.skip("both nodes are this machine, and two ranks cannot share its GPU")
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,  # pytest's are too long for munge's socket
        slurm_cluster(Path(folder)) as running,
    ):
        yield running


@pytest.fixture
def workspace(tmp_path: Path, cluster: SlurmCluster) -> Workspace:
    return Workspace(tmp_path, cluster)


@pytest.fixture(scope="session")
def without_slurm(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """The workspace's recipe over two ranks."""
    folder = tmp_path_factory.mktemp("without_slurm")
    data = write_trajectories(folder / "data.jsonl")
    return steps_of(train_runs(2, data, {folder / "run": OVERRIDES})[folder / "run"])
