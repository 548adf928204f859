"""The chain score -> sft -> export: it arrives, and it stops where a stage fails."""

from __future__ import annotations

import json
import random
import re

import pytest
import yaml

from tests.megatron.runs import REPOSITORY
from tests.slurm.cluster import wait_until
from tests.slurm.workspace import Workspace

pytest.importorskip("transformers", reason="needs the extra hf")

from tests.score.tiny import save_tiny_llama

pytestmark = pytest.mark.slow

SCORE = "-- --model teacher --data data.jsonl"
# Of the tiny Llama that the test makes: model.hf gives the rest.
RECIPE = {
    "defaults": str(REPOSITORY / "recipes" / "sft" / "base.yaml"),
    "output_dir": "results/tiny",
    "model": {"hf": "student"},
    "train": {"precision": "fp32", "global_batch_size": 8, "micro_batch_size": 2, "max_steps": 2},
    "data": {"seq_length": 64},
    "cluster": {"num_nodes": 2, "gpus_per_node": 1, "gpu": "cpu"},
}


@pytest.fixture
def models(workspace: Workspace) -> Workspace:
    """A workspace with a teacher, a student, prompts with the teacher's answers, and a recipe."""
    folder, rng = workspace.folder, random.Random(0)
    save_tiny_llama(folder / "teacher", seed=0)
    save_tiny_llama(folder / "student", seed=1)
    rows = [{"prompt": f"{i} and {i}?", "response": str(rng.randrange(10**9))} for i in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return workspace


def jobs_of(said: str) -> list[str]:
    """The jobs' ids, as pipeline.sh prints them."""
    return re.findall(r"^(?:score|sft|export)\s+job (\d+)", said, re.MULTILINE)


def test_the_pipeline_goes_from_trajectories_to_a_hugging_face_folder_with_a_stage_requeued(
    models: Workspace,
) -> None:
    said = models.shell(
        "slurm/pipeline.sh recipe.yaml optimizer.lr=1.0e-3 -- --model teacher --data data.jsonl"
    )
    score, sft, export = jobs_of(said)
    wait_until(lambda: "follow it with" in models.log(score), "the first stage to start")
    models.cluster.run("scancel", "--batch", "--signal=USR1", score)  # its time is nearly up
    assert models.finish(score, "COMPLETED")["Restarts"] == "1"
    for job in (sft, export):  # they have waited for it
        models.finish(job, "COMPLETED")
    assert [step for step, _, _ in models.steps("results/tiny")] == [1, 2]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = models.folder / "results" / "tiny" / "export"
    trained = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    student = AutoModelForCausalLM.from_pretrained(models.folder / "student").state_dict()
    assert trained.keys() == student.keys()
    assert not all(trained[name].equal(student[name]) for name in student)
    assert AutoTokenizer.from_pretrained(exported)("7 and 7?").input_ids


def test_a_stage_that_fails_stops_the_chain_and_its_log_says_why(models: Workspace) -> None:
    said = models.shell("slurm/pipeline.sh recipe.yaml -- --model nowhere --data data.jsonl")
    score, sft, export = jobs_of(said)
    assert f"pear-score-{score}.log" in said
    models.finish(score, "FAILED")
    models.finish(sft, "CANCELLED")
    models.finish(export, "CANCELLED")
    log = models.log(score)
    assert f"read {models.folder}/logs/pear-score-{score}/" in log
    assert "error: no model at nowhere" in log
    assert not (models.folder / "results" / "tiny" / "scored.parquet").exists()


def test_a_mistake_in_the_recipe_submits_nothing(models: Workspace) -> None:
    said = models.shell(f"slurm/pipeline.sh recipe.yaml train.max_step=2 {SCORE} 2>&1", check=False)
    assert "unknown key 'max_step'; did you mean 'max_steps'?" in said
    assert not jobs_of(said)


def test_a_chain_that_slurm_does_not_take_whole_is_taken_back(models: Workspace) -> None:
    (models.folder / "slurm" / "export.sbatch").unlink()
    said = models.shell(f"slurm/pipeline.sh recipe.yaml {SCORE} 2>&1", check=False)
    assert "export.sbatch" in said
    assert not jobs_of(said)
    wait_until(lambda: not models.shell("squeue --noheader"), "no job to be left")
