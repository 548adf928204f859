"""grpo.sbatch: checked in the job, then NeMo-RL's ray.sub with all that it reads. Its containers are not run here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.rl.nemo_rl.exports import write_export
from tests.rl.nemo_rl.stand_in import write_stand_in
from tests.slurm.workspace import Workspace

READ_BY_RAY_SUB = (
    "COMMAND", "CONTAINER", "MOUNTS", "SLURM_SUBMIT_DIR", "BASE_LOG_DIR", "GPUS_PER_NODE", "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION",
)  # fmt: skip


@pytest.fixture
def grpo(workspace: Workspace) -> Workspace:
    """The workspace with an export, a recipe for its two nodes, and a NeMo-RL whose ray.sub says what it was given."""
    root = write_stand_in(workspace.folder / "nemo-rl")
    lines = "".join(f'echo "{name}=${{{name}?}}"\n' for name in READ_BY_RAY_SUB)
    (root / "ray.sub").write_text(f'set -eu\n{{\n{lines}}} > "$BASE_LOG_DIR/given"\n')
    write_export(workspace.folder / "export")
    recipe = Path(__file__).parents[2] / "recipes" / "grpo" / "qwen2.5-7b.yaml"
    (workspace.folder / "grpo.yaml").write_text(
        f"defaults: {recipe}\ncluster: {{num_nodes: 2, gpus_per_node: 1}}\n"
        "policy: {generation: {vllm_cfg: {tensor_parallel_size: 2}}}\n"
    )
    with (workspace.folder / "slurm" / "cluster.env").open("a") as file:
        file.write(f"export NEMO_RL_DIR={root} NEMO_RL_CONTAINER=nemo-rl.sqsh PEAR_MOUNTS=/models:/models\n")
    return workspace


def test_ray_sub_gets_the_checked_command_in_the_jobs_own_allocation(grpo: Workspace) -> None:
    job = grpo.sbatch(
        "--nodes=2 --time=50 slurm/grpo.sbatch --config grpo.yaml --checkpoint export grpo.max_num_steps=5"
    )
    grpo.finish(job, "COMPLETED")
    given = dict(
        line.split("=", 1) for line in (grpo.folder / f"logs/pear-grpo-{job}/given").read_text().splitlines()
    )
    nemo_rl = f"{grpo.folder}/nemo-rl"
    assert given["COMMAND"].startswith(f"cd {nemo_rl} && env NEMO_RL_DIR={nemo_rl} ")
    assert f"--config {grpo.folder}/grpo.yaml grpo.max_num_steps=5" in given["COMMAND"]
    assert f" policy.model_name={grpo.folder}/export " in given["COMMAND"]
    limit = re.search(r"checkpoint_must_save_by=\D*(\d\d:\d\d:\d\d):", given["COMMAND"])
    assert limit is not None
    assert "00:00:20" <= limit[1] <= "00:00:30"  # 50 minutes, less 20, less what has passed
    assert given["CONTAINER"] == "nemo-rl.sqsh"
    assert given["SLURM_SUBMIT_DIR"] == nemo_rl
    assert (given["GPUS_PER_NODE"], given["SLURM_JOB_NUM_NODES"]) == ("1", "2")
    mounts = given["MOUNTS"].split(",")
    assert {f"{nemo_rl}:{nemo_rl}", f"{grpo.folder}:{grpo.folder}", "/models:/models"} <= set(mounts)


def test_a_job_of_the_wrong_size_ends_at_once_and_says_why(grpo: Workspace) -> None:
    job = grpo.sbatch("--nodes=1 slurm/grpo.sbatch --config grpo.yaml --checkpoint export")
    grpo.finish(job, "FAILED")
    assert (
        "cluster.num_nodes is 2 and the Slurm job has 1 node(s); ask for 2 node(s) with --nodes=2"
        in grpo.log(job)
    )
    assert not list(grpo.folder.glob("logs/*/given"))
