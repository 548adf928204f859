"""What a run writes, and how it says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.megatron.runs import Started, launch, write_trajectories
from tests.megatron.test_resume import wait_until


def failure(*overrides: str, processes: int = 1) -> str:
    done = launch(processes, *overrides, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr.split("error: ")[0]
    return "error: " + done.stderr.split("error: ", 1)[1]


def test_metrics_have_a_row_per_step_with_the_pear_diagnostics(one_rank: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in one_rank] == [1, 2, 3, 4, 5, 6]
    for key in (
        "loss", "grad_norm", "lr", "tokens_per_second", "nll", "decisions", "pear/log_ratio", "pear/weight",
        "pear/ratio_clipped_low", "pear/ratio_clipped_high", "pear/weight_at_floor",
        "pear/weight_at_ceiling", "pear/effective_sample_size",
    ):  # fmt: skip
        assert key in one_rank[0]
    assert 0 < one_rank[0]["pear/effective_sample_size"] <= 1


def test_run_folder_holds_the_resolved_recipe_and_tensorboard(one_rank_folder: Path) -> None:
    config = yaml.safe_load((one_rank_folder / "config.yaml").read_text())
    assert config["train"]["max_steps"] == 6
    assert config["pear"]["log_ratio_clip"] == [-0.08, 0.3]
    assert list((one_rank_folder / "tensorboard").glob("events.out.tfevents.*"))


def test_an_epoch_trains_every_trajectory_once(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl", count=12)
    launch(1, f"data.train={data}", f"output_dir={tmp_path / 'run'}", "train.global_batch_size=2")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    decisions = sum(sum(json.loads(line)["loss_mask"]) for line in data.read_text().splitlines())
    assert sum(row["decisions"] for row in rows) == decisions
    assert {row["epoch"] for row in rows} == {0}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pear.gama=0.9"], "pear: unknown key 'gama'; did you mean 'gamma'?"),
        (["pear.gamma=2"], "pear.gamma: Input should be less than or equal to 1"),
        (
            ["train.global_batch_size=7"],
            "train.global_batch_size 7 is not divisible by train.micro_batch_size 2",
        ),
        (
            ["parallel.tensor_model_parallel_size=2"],
            "does not divide the 1 process(es) that torchrun started",
        ),
        (["data.train=/nowhere/data.jsonl"], "/nowhere/data.jsonl"),
    ],
)
def test_user_errors_are_one_line_and_name_the_key(
    tmp_path: Path, trajectories: Path, overrides: list[str], said: str
) -> None:
    message = failure(f"data.train={trajectories}", f"output_dir={tmp_path / 'run'}", *overrides)
    assert said in message


def test_an_output_dir_that_cannot_be_made_is_said(tmp_path: Path, trajectories: Path) -> None:
    (tmp_path / "file").touch()
    message = failure(f"data.train={trajectories}", f"output_dir={tmp_path / 'file' / 'run'}")
    assert "output_dir" in message
    assert "cannot be made" in message


def test_data_errors_name_file_and_line_on_one_rank_and_stop_all(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl", count=3)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[1]["behavior_logprobs"] = rows[1]["behavior_logprobs"][:-1]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch(2, f"data.train={data}", f"output_dir={tmp_path / 'run'}", check=False)
    assert done.returncode != 0
    assert f"{data}:2" in done.stderr
    assert "behavior_logprobs" in done.stderr


def test_collapse_to_the_floor_and_random_weights_are_said_loudly(tmp_path: Path) -> None:
    surer_than_the_model = write_trajectories(tmp_path / "data.jsonl", count=8, logprob=-1.0)
    done = launch(
        1,
        f"data.train={surer_than_the_model}",
        f"output_dir={tmp_path / 'run'}",
        "train.max_steps=1",
        "pear.log_weight_clip=[-0.5,5]",
    )
    assert "of the weights are at their floor" in done.stderr
    assert "pear.baseline=sequence_mean" in done.stderr
    assert "the model starts from random weights" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_names_trajectories(
    tmp_path: Path, trajectories: Path
) -> None:
    message = failure(
        f"data.train={trajectories}",
        f"output_dir={tmp_path / 'run'}",
        "train.max_steps=4",
        "optimizer.lr=1e30",
        "optimizer.clip_grad=0",
    )
    assert "loss is nan at step" in message
    assert "trajectory-" in message
    assert not (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


def test_help_shows_an_example() -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "pear_megatron.train", "--help"], capture_output=True, text=True, check=True
    )
    assert "torchrun --nproc-per-node 2 -m pear_megatron.train" in done.stdout


def test_two_runs_are_not_in_one_folder(tmp_path: Path) -> None:
    from pear_megatron.storage import lock

    data = write_trajectories(tmp_path / "data.jsonl", count=4)
    with lock(tmp_path / "run", patience=0.0):
        run = Started(2, f"data.train={data}", f"output_dir={tmp_path / 'run'}", "train.max_steps=1")
        wait_until(lambda: "another run is at work in" in run.output(), seconds=120)
        assert not (tmp_path / "run" / "config.yaml").exists()
    assert run.wait() == [0, 0]  # the other one has ended
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--output_dir=a"], {}, "keys of the recipe have no dashes: output_dir=a"),
        (["--nproc-per-node", "0"], {}, "0 is no number of ranks; give 1 or more"),
        (["--nproc-per-node", "2"], {"WORLD_SIZE": "1"}, "WORLD_SIZE=1 is in the environment"),
        ([], {"WORLD_SIZE": "2"}, "beside no RANK"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str],
    environment: dict[str, str], said: str,
) -> None:  # fmt: skip
    from pear_megatron.train.__main__ import main

    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["--config", "x.yaml", *arguments])
    assert said in capsys.readouterr().err + str(ended.value)


def test_overrides_stand_on_both_sides_of_options() -> None:
    from pear_megatron.train.__main__ import parse_arguments

    args = parse_arguments(["a=1", "--config", "x.yaml", "b=2", "--nproc-per-node", "2", "c=3"])
    assert args.overrides == ["a=1", "b=2", "c=3"]
    assert args.nproc_per_node == 2
