"""Training over two nodes: it finishes, it is stopped, a node dies, it is told wrong things."""

from __future__ import annotations

import re

import pytest

from tests.slurm.workspace import Steps, Workspace

pytestmark = pytest.mark.slow


def test_two_nodes_train_as_two_processes_do(workspace: Workspace, without_slurm: Steps) -> None:
    job = workspace.sbatch("--nodes=2 slurm/sft.sbatch recipe.yaml train.max_steps=3")
    workspace.finish(job, "COMPLETED")
    assert workspace.steps() == without_slurm[:3]
    logs = workspace.folder / "logs" / f"pear-sft-{job}"
    assert sorted(path.name for path in logs.iterdir()) == ["node-0.log", "node-1.log"]


def test_a_site_that_exports_nothing_to_jobs_trains_too(workspace: Workspace) -> None:
    """There Slurm's steps do not get what the job's script sets either, unless it says so."""
    job = workspace.sbatch("--export=NONE --nodes=2 slurm/sft.sbatch recipe.yaml train.max_steps=2")
    workspace.finish(job, "COMPLETED")
    assert len(workspace.steps()) == 2


def test_a_job_asked_to_stop_saves_is_requeued_and_ends_as_if_nothing_had_happened(
    workspace: Workspace, without_slurm: Steps
) -> None:
    job = workspace.sbatch("--nodes=2 slurm/sft.sbatch recipe.yaml")
    workspace.wait_for_step(2)
    workspace.cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@300 does
    fields = workspace.finish(job, "COMPLETED")
    assert fields["Restarts"] == "1"
    assert "stopped early; requeueing it" in workspace.log(job)
    assert workspace.steps() == without_slurm


def test_a_job_that_loses_a_node_goes_on_from_its_last_checkpoint(
    workspace: Workspace, without_slurm: Steps
) -> None:
    job = workspace.sbatch("--nodes=2 slurm/sft.sbatch recipe.yaml checkpoint.save_interval=4")
    workspace.wait_for_step(5)
    workspace.cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    workspace.cluster.wait(job, "PENDING")
    workspace.cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    fields = workspace.finish(job, "COMPLETED")
    assert fields["Restarts"] == "1"
    first, second = sorted(map(int, re.findall(r"steps (\d+) to 12", workspace.node_logs(job))))
    assert first == 0
    assert second >= 4
    assert workspace.steps() == without_slurm


def test_a_job_that_is_cancelled_stays_cancelled(workspace: Workspace) -> None:
    job = workspace.sbatch("--nodes=2 slurm/sft.sbatch recipe.yaml train.max_steps=10000")
    workspace.wait_for_step(1)
    workspace.cluster.run("scancel", job)
    assert workspace.finish(job, "CANCELLED")["Restarts"] == "0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "--nodes=2 slurm/sft.sbatch recipe.yaml pear.gama=0.9",
            "pear: unknown key 'gama'; did you mean 'gamma'?",
        ),
        ("slurm/sft.sbatch recipe.yaml", "submit it with `sbatch --nodes=2 ...`"),
        (
            "--nodes=2 slurm/sft.sbatch recipe.yaml cluster.gpus_per_node=8",
            "the job runs 1 process(es) a node",
        ),
        ("--nodes=2 slurm/sft.sbatch", "no recipe given"),
        ("slurm/grpo.sbatch --checkpoint run", "no ray.sub in NEMO_RL_DIR"),
        ("--nodes=2 --gpus-per-node=0 slurm/sft.sbatch recipe.yaml", "set SBATCH_GPUS_PER_NODE"),
    ],
)
def test_mistakes_are_said_at_once_and_end_the_job_with_exit_code_1(
    workspace: Workspace, arguments: str, said: str
) -> None:
    job = workspace.sbatch(arguments)
    assert workspace.finish(job, "FAILED")["ExitCode"] == "1:0"
    assert "error: " in workspace.log(job)
    assert said in workspace.log(job)
    assert not (workspace.folder / "run").exists()
