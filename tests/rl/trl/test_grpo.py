"""GRPO with TRL learns, asks every checkpoint the same, and survives a kill."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

pytest.importorskip("trl", reason="needs the extra rl")

from pear_megatron.cli import app
from pear_megatron.data.errors import DataError
from pear_megatron.errors import CheckpointError, RecipeError
from pear_megatron.problems.graders import GraderError
from pear_megatron.rl.trl.grpo import run
from pear_megatron.rl.trl.recipe import load_trl_recipe
from pear_megatron.storage import digest
from tests.distributed import run_ranks
from tests.evaluate.words import GRADER, save_word_model, write_problems


def write_recipe(folder: Path, grader: str = GRADER, **sections: dict[str, Any]) -> Path:
    problems = write_problems(folder, grader=grader)
    values: dict[str, Any] = {
        "grpo": {"num_prompts_per_step": 4, "num_generations_per_prompt": 4, "max_num_steps": 4},
        "policy": {
            "max_total_sequence_length": 16,
            "train_micro_batch_size": 8,
            "precision": "float32",
            "generation": {"max_new_tokens": 6},
            "optimizer": {"kwargs": {"lr": 0.02}},
        },
        "data": {"train": {"jsonl": str(problems), "grader": str(problems.with_suffix(".py"))}},
        "checkpointing": {"save_period": 2},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train(recipe: Path, checkpoint: Path, output: Path, *overrides: str) -> Path:
    return run(load_trl_recipe(recipe, list(overrides)), checkpoint, output)


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds_per_update"} for row in rows]


def test_reward_rises_on_a_task_that_a_tiny_model_can_learn(word_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, grpo={"max_num_steps": 20, "num_prompts_per_step": 6, "num_generations_per_prompt": 8}
    )
    final = train(recipe, word_model, tmp_path / "out")
    rows = metrics(tmp_path / "out")
    rewards = [row["reward"] for row in rows]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    assert all(0 <= row["groups_with_advantage"] <= 1 for row in rows)
    assert all(row["loss"] == row["loss"] and row["completion_length"] <= 6 for row in rows)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained, start = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (final, word_model))
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert AutoTokenizer.from_pretrained(final)("a b")["input_ids"] == [0, 1]
    assert not [path.name for path in final.iterdir() if "optimizer" in path.name or path.suffix == ".bin"]


# Writes down which problems it is asked to grade.
_RECORDER = (
    GRADER
    + """
import json, pathlib
plain = grade
def grade(response, answer, problem):
    with pathlib.Path(__file__).with_name("asked").open("a") as file:
        file.write(problem["id"] + "\\n")
    return plain(response, answer, problem)
"""
)


def test_two_checkpoints_are_asked_the_same_prompts_in_the_same_order(
    word_model: Path, tmp_path: Path
) -> None:
    other = save_word_model(tmp_path / "other", seed=5)
    recipe = write_recipe(tmp_path, _RECORDER)
    asked, rewards, problems = [], [], []
    for name, checkpoint in (("one", word_model), ("two", other)):
        train(recipe, checkpoint, tmp_path / name)
        asked.append((tmp_path / "asked").read_text().split())
        rewards.append([row["reward"] for row in metrics(tmp_path / name)])
        problems.append([row["problems"] for row in metrics(tmp_path / name)])
        (tmp_path / "asked").unlink()
    assert asked[0] == asked[1]
    assert len(asked[0]) == 4 * 4 * 4
    assert all(len(set(asked[0][i : i + 4])) == 1 for i in range(0, 64, 4))  # a group is one prompt
    assert len(set(asked[0])) == 6
    assert rewards[0] != rewards[1]
    assert problems[0] == problems[1]  # by which `pear-megatron compare` knows
    numbers = [int(name.removeprefix("p")) for name in asked[0]]
    assert problems[0] == [digest(numbers[i : i + 16]) for i in range(0, 64, 16)]
    train(recipe, word_model, tmp_path / "another-seed", "grpo.seed=7")
    assert (tmp_path / "asked").read_text().split() != asked[0]
    assert [row["problems"] for row in metrics(tmp_path / "another-seed")] != problems[0]


def test_the_same_run_twice_is_the_same(word_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for name in ("one", "two"):
        train(recipe, word_model, tmp_path / name)
    assert without_times(metrics(tmp_path / "one")) == without_times(metrics(tmp_path / "two"))


# Ends its run in the third step's grading, once.
_ENDER = (
    GRADER
    + """
import os, pathlib, signal
count = 0
plain = grade
def grade(response, answer, problem):
    global count
    count += 1
    mark = pathlib.Path(__file__).with_name("ended-once")
    if count == 2 * 16 + 5 and not mark.exists():
        mark.touch()
        END
    return plain(response, answer, problem)
"""
)


def _train_on_a_rank(rank: int, recipe: Path, checkpoint: Path, output: Path) -> None:
    torch.distributed.destroy_process_group()  # Trainer would take it for its own
    train(recipe, checkpoint, output)


def check_continued_run_equals_whole_run(recipe: Path, checkpoint: Path, folder: Path) -> None:
    assert [row["step"] for row in metrics(folder / "out")] == [1, 2]
    train(recipe, checkpoint, folder / "out")
    train(recipe, checkpoint, folder / "whole")
    assert [row["step"] for row in metrics(folder / "out")] == [1, 2, 3, 4]
    assert without_times(metrics(folder / "out")) == without_times(metrics(folder / "whole"))
    weights = [(folder / name / "final" / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


def test_a_run_stopped_midway_continues_as_if_nothing_had_happened(word_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, _ENDER.replace("END", "raise ValueError"))
    with pytest.raises(GraderError, match="grade raised ValueError"):
        train(recipe, word_model, tmp_path / "out")
    half_written = tmp_path / "out" / "checkpoints" / "checkpoint-3"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"half")
    check_continued_run_equals_whole_run(recipe, word_model, tmp_path)


@pytest.mark.slow
def test_a_killed_run_with_two_updates_a_step_continues_too(word_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, _ENDER.replace("END", "os.kill(os.getpid(), signal.SIGKILL)"))
    recipe.write_text(recipe.read_text().replace("policy:\n", "policy:\n  train_global_batch_size: 8\n"))
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_ranks(1, _train_on_a_rank, recipe, word_model, tmp_path / "out")
    check_continued_run_equals_whole_run(recipe, word_model, tmp_path)


def test_a_finished_run_is_left_alone_and_may_be_made_longer(word_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    final = train(recipe, word_model, tmp_path / "out", "grpo.max_num_steps=2")
    before = (final / "model.safetensors").stat().st_mtime_ns
    train(recipe, word_model, tmp_path / "out", "grpo.max_num_steps=2")
    assert (final / "model.safetensors").stat().st_mtime_ns == before
    train(recipe, word_model, tmp_path / "out")
    train(recipe, word_model, tmp_path / "whole")
    assert without_times(metrics(tmp_path / "out")) == without_times(metrics(tmp_path / "whole"))


def test_another_run_is_refused_the_folder(word_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    train(recipe, word_model, tmp_path / "out", "grpo.max_num_steps=1")
    with pytest.raises(RecipeError, match=r"other settings: policy\.optimizer\.kwargs\.lr "):
        train(recipe, word_model, tmp_path / "out", "policy.optimizer.kwargs.lr=0.1")
    with pytest.raises(RecipeError, match="other settings: weights "):
        train(recipe, save_word_model(tmp_path / "other", seed=5), tmp_path / "out")


def test_kl_is_measured_where_it_is_penalised(word_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, loss_fn={"reference_policy_kl_penalty": 0.1})
    train(recipe, word_model, tmp_path / "out")
    kl = [row["kl"] for row in metrics(tmp_path / "out")]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)  # the first rollouts are the checkpoint's own
    assert kl[-1] > 1e-4


def test_trl_and_eval_give_a_model_the_same_prompt_tokens(word_model: Path, tmp_path: Path) -> None:
    from pear_megatron.data.tokenizer import load_tokenizer
    from pear_megatron.problems.load import load_problems
    from pear_megatron.problems.prompts import encode_prompts
    from pear_megatron.rl.trl.grpo import _trainer
    from pear_megatron.rl.trl.run_folder import TrlRunFolder

    chat = shutil.copytree(word_model, tmp_path / "chat")
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ first or 'a' }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}b{% endif %}"
    )
    path = write_recipe(tmp_path)
    recipe = load_trl_recipe(path)
    problems = load_problems(recipe.data.train)
    for model in (word_model, chat):
        trainer = _trainer(recipe, model, problems, TrlRunFolder(tmp_path / model.name, recipe, "w"))
        encoded = encode_prompts(load_tokenizer(str(model)), problems, 1, None)
        rows = trainer.train_dataset
        assert trainer._tokenize_prompts(rows["prompt"][:])[0] == [encoded[i] for i in rows["problem"]]
    assert encoded[0][0] == 0
    assert encoded[0][-1] == 1
    given = load_trl_recipe(path, ["policy.tokenizer.chat_template_kwargs.first=c"])
    trainer = _trainer(given, chat, problems, TrlRunFolder(tmp_path / "given", given, "w"))
    assert {ids[0] for ids in trainer._tokenize_prompts(trainer.train_dataset["prompt"][:])[0]} == {2}


def test_bad_problems_and_grades_stop_the_run_by_name(word_model: Path, tmp_path: Path) -> None:
    nan = write_recipe(tmp_path / "nan", "def grade(response, answer, problem):\n    return float('nan')\n")
    with pytest.raises(GraderError, match=r"grade returned nan on problem p\d \(.*problems.jsonl:\d\)"):
        train(nan, word_model, tmp_path / "out")
    recipe = write_recipe(tmp_path)
    with pytest.raises(DataError, match=r"problems.jsonl:6: the prompt of p5 has 7 tokens"):
        train(recipe, word_model, tmp_path / "long", "policy.max_total_sequence_length=12")
    train(recipe, word_model, tmp_path / "long", "grpo.max_num_steps=1")  # nothing had begun
    values = yaml.safe_load(recipe.read_text())
    values["data"]["validation"] = values["data"]["train"]
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=r"all 6 problems of data.train are in data.validation"):
        train(recipe, word_model, tmp_path / "leak")


def test_the_command_runs_and_says_what_is_wrong(word_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    command = ["grpo", "--engine", "trl", "--config", str(recipe), "--checkpoint", str(word_model)]
    wrong = CliRunner().invoke(app, command)
    assert wrong.exit_code == 1
    assert "--engine trl needs --output" in wrong.stderr
    options = ["--output", str(tmp_path / "out"), "grpo.max_num_steps=1", "data.train.size=4"]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 0, done.stderr
    assert str(tmp_path / "out" / "final") in done.stdout
    assert "step 1/1  reward" in done.stderr


def test_checkpoints_go_by_their_steps_whatever_the_clock_said(word_model: Path, tmp_path: Path) -> None:
    recipe, output = (
        write_recipe(tmp_path, checkpointing={"save_period": 1, "keep_last": 1}),
        tmp_path / "out",
    )
    train(recipe, word_model, output, "grpo.max_num_steps=2")
    (checkpoint,) = (output / "checkpoints").glob("checkpoint-*")
    ahead = checkpoint.stat().st_mtime + 86400
    os.utime(checkpoint, (ahead, ahead))
    (output / "checkpoints" / "checkpoint-old").mkdir()  # a person's
    with (output / "metrics.jsonl").open("a") as file:
        file.write("damaged\n")
    train(recipe, word_model, output, "grpo.max_num_steps=4")
    left = sorted(path.name for path in (output / "checkpoints").glob("checkpoint-*"))
    assert left == ["checkpoint-4", "checkpoint-old"]
    final = (output / "final" / "model.safetensors").read_bytes()
    assert final == (output / "checkpoints" / "checkpoint-4" / "model.safetensors").read_bytes()
    assert [row["step"] for row in metrics(output)] == [1, 2, 3, 4]


def test_a_run_is_not_gone_on_with_without_what_it_was(
    word_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, output = write_recipe(tmp_path, checkpointing={"save_period": 1}), tmp_path / "out"
    train(recipe, word_model, output, "grpo.max_num_steps=2")
    train(recipe, word_model, output, "grpo.max_num_steps=1")
    assert "is at step 2 already, and grpo.max_num_steps is 1" in caplog.text
    (output / "checkpoints" / "checkpoint-2" / "optimizer.pt").unlink()
    train(recipe, word_model, output, "grpo.max_num_steps=2")
    assert "checkpoint-2 (optimizer.pt is missing); going on from step 1" in caplog.text
    assert len(metrics(output)) == 2
    for step in (1, 2):
        weights = output / "checkpoints" / f"checkpoint-{step}" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=r"is whole: .*checkpoint-2 \(model.safetensors has \d+ of \d+ bytes"
    ):
        train(recipe, word_model, output, "grpo.max_num_steps=2")
    assert len(list((output / "checkpoints").glob("checkpoint-*"))) == 2
    (output / "config.yaml").unlink()
    with pytest.raises(RecipeError, match=r"holds a run and no config\.yaml"):
        train(recipe, word_model, output)


def test_a_run_without_any_difference_in_rewards_says_that_it_learned_nothing(
    word_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_recipe(tmp_path, "def grade(response, answer, problem):\n    return 0.0\n")
    train(recipe, word_model, tmp_path / "out", "grpo.max_num_steps=1")
    assert "nothing was learned" in caplog.text
