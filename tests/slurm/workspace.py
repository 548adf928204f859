"""Workspace: a user's folder on the cluster: the real scripts, a cluster.env edited once, a recipe and data."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tests.megatron.ranks import SMALL
from tests.megatron.runs import REPOSITORY, TINY, write_trajectories
from tests.slurm.cluster import PATIENCE, SlurmCluster, wait_until

# Steps slow enough that there is time to stop a run in its middle.
OVERRIDES = [*SMALL, "train.global_batch_size=96", "train.max_steps=12", "optimizer.lr_decay_style=constant"]
_CLUSTER = ["cluster.num_nodes=2", "cluster.gpus_per_node=1", "cluster.gpu=cpu"]
Steps = list[tuple[int, float, float]]


def steps_of(rows: list[dict[str, Any]]) -> Steps:
    """(step, loss, grad_norm) of a run's metrics."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


class Workspace:
    """A folder to submit jobs from.

    Args:
        folder: where.
        cluster: where the jobs go; each node has one (invented) GPU.
    """

    def __init__(self, folder: Path, cluster: SlurmCluster) -> None:
        self.folder, self.cluster = folder, cluster
        shutil.copytree(REPOSITORY / "slurm", folder / "slurm")
        with (folder / "slurm" / "cluster.env").open("a") as file:
            file.write(f"export SBATCH_GPUS_PER_NODE=1 PEAR_PYTHON={sys.executable} OMP_NUM_THREADS=1\n")
        write_trajectories(folder / "data.jsonl")
        recipe = OmegaConf.from_dotlist([*OVERRIDES, "output_dir=run", "data.train=data.jsonl", *_CLUSTER])
        (folder / "recipe.yaml").write_text(f"defaults: {TINY}\n{OmegaConf.to_yaml(recipe)}")

    def shell(self, command: str, check: bool = True) -> str:
        """A command line in a shell that has read cluster.env, as a user's has -> its standard output."""
        profile = "source slurm/cluster.env; "
        return self.cluster.run("bash", "-c", profile + command, check=check, cwd=self.folder).strip()

    def sbatch(self, arguments: str) -> str:
        """Submits -> the job's id."""
        return self.shell(f"sbatch --parsable {arguments}")

    def log(self, job_id: str) -> str:
        """What a job has written to its own log."""
        return "".join(log.read_text() for log in self.folder.glob(f"*-{job_id}.log"))

    def node_logs(self, job_id: str) -> str:
        """What the processes of a job have written."""
        return "".join(log.read_text() for log in self.folder.glob(f"logs/*-{job_id}/node-*.log"))

    def finish(self, job_id: str, state: str, seconds: float = PATIENCE) -> dict[str, str]:
        """Waits for a job to end in this state -> its fields."""
        job = self.cluster.wait(job_id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=seconds)
        assert job["JobState"] == state, self.log(job_id) + self.node_logs(job_id)
        return job

    def steps(self, run: str = "run") -> Steps:
        """What a run has done so far."""
        path = self.folder / run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return steps_of([json.loads(line) for line in lines if line.endswith("}")])

    def wait_for_step(self, step: int) -> None:
        """Waits until the run has done this step."""
        wait_until(lambda: len(self.steps()) >= step, f"step {step} of {self.folder}")
