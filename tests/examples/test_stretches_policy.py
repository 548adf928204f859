"""The demo's steps, small: initial checkpoint -> TP = 2 training -> answers and log-probs on one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.stretches import world
from examples.stretches.make_data import make_data
from tests.megatron.runs import REPOSITORY, launch, metrics

RECIPES = REPOSITORY / "recipes" / "sft"


def policy(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "examples.stretches.policy", *arguments],
        check=True,
        cwd=REPOSITORY,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, the initial checkpoint, and a run of three steps at TP = 2 from it."""
    folder = tmp_path_factory.mktemp("stretches")
    make_data(folder / "data", seed=1, num_base=8, num_offline=48, num_heldout=4)
    policy("init", "--recipe", str(RECIPES / "stretches_base.yaml"), "--output", str(folder / "initial"))
    launch(
        2,
        f"data.train={folder / 'data' / 'offline.jsonl'}",
        f"checkpoint.pretrained={folder / 'initial'}",
        f"output_dir={folder / 'run'}",
        "train.max_steps=3",
        "train.global_batch_size=16",
        "train.micro_batch_size=16",
        config=RECIPES / "stretches.yaml",
    )
    return folder


def test_training_starts_from_the_initial_checkpoint_and_counts_every_decision(world_folder: Path) -> None:
    rows = metrics(world_folder / "run")
    assert [row["decisions"] for row in rows] == [16 * world.RESPONSE_LENGTH] * 3
    assert rows[0]["nll"] == pytest.approx(np.log(world.VOCAB_SIZE), rel=0.2)


def test_answers_are_tokens_of_the_world_for_every_problem(world_folder: Path) -> None:
    output = world_folder / "answers.npz"
    problems = str(world_folder / "data" / "heldout.jsonl")
    run = str(world_folder / "run")
    policy("answer", "--run", run, "--problems", problems, "--samples", "2", "--output", str(output))
    responses = np.load(output)["responses"]
    assert responses.shape == (4, 2, world.RESPONSE_LENGTH)
    assert responses.min() >= 0
    assert responses.max() < world.VOCAB_SIZE


def test_scores_agree_with_the_loss_that_training_reported(world_folder: Path) -> None:
    """Log-probs of the initial model on one process = the first step's nll on two."""
    output = world_folder / "scores.npz"
    trajectories = str(world_folder / "data" / "offline.jsonl")
    run = str(world_folder / "initial")
    policy("score", "--run", run, "--trajectories", trajectories, "--output", str(output))
    stored = np.load(output)
    assert stored["logprobs"].shape == stored["behavior_logprobs"].shape == (48, world.RESPONSE_LENGTH)
    # A step trains on 16 of the 48 trajectories: their means are near each other, not the same.
    assert -stored["logprobs"].mean() == pytest.approx(metrics(world_folder / "run")[0]["nll"], rel=0.02)
