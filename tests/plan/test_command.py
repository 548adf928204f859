"""`pear-megatron plan`, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pear_megatron.cli import app
from tests.megatron.runs import TINY, write_trajectories
from tests.plan.recipes import FOLDER, HF_CONFIGS


def plan(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_recipe_alone_gives_layout_memory_and_time_of_a_step() -> None:
    done = plan("--config", FOLDER / "qwen2.5-72b.yaml")
    assert done.exit_code == 0, done.stderr
    for said in (
        "72.706 B",
        "TP 8 x PP 4 x DP 1",
        "stage 4",
        "optimizer state",
        "assumed MFU of 40%",
        "an export",
    ):
        assert said in done.stdout


def test_a_recipe_without_its_option_is_told_so() -> None:
    done = plan("tiny.yaml", "train.max_steps=3")
    assert done.exit_code == 1
    assert "the recipe is missing: pear-megatron plan --config tiny.yaml" in done.stderr


def test_too_few_nodes_are_refused_with_the_change_that_helps() -> None:
    done = plan("--config", FOLDER / "qwen2.5-32b.yaml", "--nodes", "1")
    assert done.exit_code == 1
    assert "needs 9" in done.stderr
    assert "what fits: train.recompute_method=uniform" in done.stderr
    assert "cluster.num_nodes=2" in done.stderr
    assert "a GPU has" in done.stdout  # the table that shows why


def test_json_holds_everything_and_nothing_else_is_printed(tmp_path: Path) -> None:
    done = plan("--config", FOLDER / "qwen2.5-7b.yaml", "--tokens", "100000000", "--mfu", "0.5", "--json")
    found = json.loads(done.stdout)
    assert found["fits"] is True
    assert found["parameters"] == 7615616512
    assert found["run"]["steps"] == -(-100_000_000 // (64 * 16384))
    assert found["gpu_hours"] == pytest.approx(found["hours"] * 8)
    assert found["mfu_assumed"] == 0.5
    assert {"weights", "logits", "reserve", "total"} <= found["stages"][0].keys()
    assert found["disk"]["checkpoint"] == found["disk"]["weights"] + found["disk"]["optimizer"]
    assert found["disk"]["export"] == 2 * found["parameters"]


def test_json_of_a_recipe_that_does_not_fit_names_the_remedies() -> None:
    done = plan("--config", FOLDER / "qwen2.5-7b.yaml", "cluster.gpus_per_node=4", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["fits"] is False
    assert {"cluster.gpus_per_node": 8} in found["remedies"]


def test_data_are_counted_as_training_counts_them(tmp_path: Path) -> None:
    from pear_megatron.data import BatchPlan, TrajectoryDataset

    data = write_trajectories(tmp_path / "data.jsonl", count=50)
    done = plan("--config", TINY, f"data.train={data}", f"output_dir={tmp_path}/run", "--json")
    assert done.exit_code == 0, done.stderr
    run = json.loads(done.stdout)["run"]
    (cache,) = (tmp_path / "run" / "data_cache").iterdir()  # training finds it
    dataset = TrajectoryDataset.open(cache)
    assert run["trajectories"] == 50
    assert run["tokens"] == int(dataset.lengths.sum())  # as `validate` says
    assert run["decisions"] == int(dataset.num_decisions.sum())
    assert run["steps"] == BatchPlan(dataset.lengths, 128, 8, seed=1234).steps_per_epoch()


def test_rows_are_counted_as_context_parallelism_pads_them(tmp_path: Path) -> None:
    """26 tokens are 25 positions, five times in a row of 128; padded to 28 for two ranks, four times."""
    row = {"input_ids": [1] * 26, "loss_mask": [0] + [1] * 25, "behavior_logprobs": [-1.0] * 26}
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps(row)}\n" * 20)
    steps = {}
    for cp in (1, 2):
        sizes = [
            f"parallel.context_parallel_size={cp}",
            f"cluster.gpus_per_node={cp}",
            "train.global_batch_size=2",
        ]
        done = plan("--config", TINY, f"data.train={data}", f"output_dir={tmp_path}/run", *sizes, "--json")
        assert done.exit_code == 0, done.stderr
        steps[cp] = json.loads(done.stdout)["run"]["steps_per_epoch"]
    assert steps == {1: 2, 2: 3}


def test_a_blend_is_counted_as_training_draws_it(tmp_path: Path) -> None:
    """20 short and 20 long trajectories: an epoch is 40 of them, or as many tokens as they have together."""
    parts, tokens = [], []
    for name, longest in (("short", 12), ("long", 100)):
        file = write_trajectories(tmp_path / f"{name}.jsonl", count=20, longest=longest)
        parts.append(f"{{path:{file},name:{name},weight:1}}")
        tokens.append(sum(len(json.loads(row)["input_ids"]) for row in file.read_text().splitlines()))
    blend = [f"data.train=[{','.join(parts)}]", f"output_dir={tmp_path}/run"]
    found = {}
    for by in ("trajectories", "tokens"):
        done = plan("--config", TINY, *blend, f"data.blend_by={by}", "--json")
        assert done.exit_code == 0, done.stderr
        found[by] = json.loads(done.stdout)["run"]
    assert found["trajectories"]["trajectories"] == 40
    drawn = sum(tokens) / 2 * 20 * (1 / tokens[0] + 1 / tokens[1])
    assert found["tokens"]["trajectories"] == pytest.approx(drawn, abs=1)
    assert found["tokens"]["tokens"] == pytest.approx(sum(tokens), rel=0.1)
    assert len(list((tmp_path / "run" / "data_cache").iterdir())) == 2  # one each, for training to find


def test_plan_and_validate_count_the_same_tokens(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl", count=20)
    run = json.loads(
        plan("--config", TINY, f"data.train={data}", f"output_dir={tmp_path}/run", "--json").stdout
    )
    said = CliRunner().invoke(app, ["validate", str(data)]).stdout
    assert run["run"]["tokens"] == sum(
        len(json.loads(row)["input_ids"]) for row in data.read_text().splitlines()
    )
    assert f" {run['run']['tokens']:,}" in said


def test_errors_name_the_file_once(tmp_path: Path) -> None:
    for overrides in (
        ["train.max_stepz=3"],
        ["cluster.gpus_per_node=3", "parallel.tensor_model_parallel_size=2"],
    ):
        said = plan("--config", TINY, *overrides).stderr
        assert said.startswith(f"error: {TINY}: ")
        assert said.count(str(TINY)) == 1


def test_broken_data_are_refused_by_file_and_line(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl", count=3)
    data.write_text(data.read_text().replace('"loss_mask"', '"loss_maks"', 1))
    done = plan("--config", TINY, f"data.train={data}", f"output_dir={tmp_path}/run")
    assert done.exit_code == 1
    assert f"{data}:1" in done.stderr


def test_data_that_are_elsewhere_are_not_needed(tmp_path: Path) -> None:
    done = plan("--config", TINY, "data.train=/cluster/math.parquet", f"output_dir={tmp_path}/run")
    assert done.exit_code == 0
    assert "/cluster/math.parquet: not here, so not counted" in done.stderr
    assert not (tmp_path / "run").exists()


def test_config_json_of_a_checkpoint_is_enough_to_plan_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIGS["qwen3-8b"]))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"defaults: {FOLDER}/base.yaml\noutput_dir: unused\nmodel: {{hf: {tmp_path}}}\n")
    found = json.loads(plan("--config", recipe, "--json").stdout)
    assert found["parameters"] == 8190735360
    assert found["remedies"]  # one GPU cannot hold the optimizer's state of 8 B parameters eight times


def test_mistakes_in_the_recipe_are_named() -> None:
    done = plan("--config", TINY, "parallel.tensor_model_paralel_size=2")
    assert done.exit_code == 1
    assert "did you mean 'tensor_model_parallel_size'" in done.stderr


def test_help_shows_an_example() -> None:
    assert "Example: pear-megatron plan" in plan("--help").stdout
