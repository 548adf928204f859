"""The scripts themselves, without Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.megatron.runs import REPOSITORY, TINY, write_trajectories
from tests.slurm.cluster import PATIENCE, wait_until

SLURM = REPOSITORY / "slurm"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck: apt-get install shellcheck")
def test_shellcheck_finds_nothing() -> None:
    scripts = [path.name for path in SLURM.iterdir() if path.suffix in (".sh", ".sbatch", ".env")]
    assert len(scripts) >= 7
    done = subprocess.run(["shellcheck", *scripts], cwd=SLURM, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_preemption_that_reaches_the_node_script_alone_reaches_training(tmp_path: Path) -> None:
    """As with proctrack/cgroup, where Slurm signals a step's tasks and not what they have started."""
    data, run = write_trajectories(tmp_path / "data.jsonl"), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = ["--config", TINY, f"data.train={data}", f"output_dir={run}", "train.max_steps=100000"]
    node = subprocess.Popen(
        [SLURM / "node.sh", "-m", "pear_megatron.train", *arguments],
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={
            **os.environ,
            "PEAR_PYTHON": sys.executable,
            "PEAR_PROCESSES": "1",
            "PEAR_RENDEZVOUS_ID": "test",
            "PEAR_RENDEZVOUS_ENDPOINT": endpoint,
            "SLURM_STEP_NUM_NODES": "1",
        },
    )
    try:
        wait_until((run / "metrics.jsonl").exists, "the first step")
        node.terminate()
        assert node.wait(PATIENCE) == 1  # torchrun's; training's own is EXIT_REQUEUE
        assert (run / "requeue").exists()
        assert list((run / "checkpoints").glob("iter_*"))
    finally:
        with suppress(ProcessLookupError):  # on failure, torchrun and what it has started
            os.killpg(node.pid, signal.SIGKILL)
