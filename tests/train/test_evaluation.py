"""Evaluations say what held-out trajectories say, on every layout, and training does not notice them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron.data import DataConfig, TrajectoryDataset, collate, prepare
from tests.distributed import run_ranks
from tests.megatron.ranks import SMALL, be_quiet, failures, final_weights, train_runs
from tests.megatron.runs import TIMES, metrics, without_times
from tests.megatron.test_layouts import DISTRIBUTED, OVERLAP, PP, TP, VPP
from tests.megatron.test_resume import interrupted_copy

KEY = "validation/"


def validating(data: dict[str, Path], *more: str) -> list[str]:
    return [f"data.validation={data['held_out']}", "train.eval_interval=2", *more]


def of_training(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of steps, without evaluations and times."""
    kept = [{k: v for k, v in row.items() if not k.startswith(KEY)} for row in without_times(rows)]
    return [row for row in kept if row.keys() > {"step"}]


def evaluations(rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    found = {
        row["step"]: {k: v for k, v in row.items() if k.startswith(KEY) and k != f"{KEY}seconds"}
        for row in rows
    }
    return {step: values for step, values in found.items() if values}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    train_runs(1, data["near"], {folder: []})
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train_runs(1, data["near"], {folder: validating(data, "checkpoint.save_interval=2")})
    return folder


def test_training_is_the_same_bit_for_bit(plain: Path, evaluated: Path) -> None:
    rows = metrics(evaluated)
    assert of_training(rows) == without_times(metrics(plain))
    assert sorted(evaluations(rows)) == [0, 2, 4]
    without, with_ = final_weights(plain, evaluated)
    assert all(torch.equal(with_[name], weight) for name, weight in without.items())


def test_it_resumes_bit_for_bit_and_evaluates_nothing_twice(
    tmp_path: Path, data: dict[str, Path], evaluated: Path
) -> None:
    copy = interrupted_copy(evaluated, tmp_path / "run", 2)
    train_runs(1, data["near"], {copy: validating(data)})
    kept = [[{k: v for k, v in row.items() if k not in {*TIMES, f"{KEY}seconds"}} for row in metrics(folder)]
            for folder in (copy, evaluated)]  # fmt: skip
    assert kept[0] == kept[1]
    weights = final_weights(copy, evaluated)
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


@pytest.mark.slow
def test_every_layout_trains_as_without_and_evaluates_as_one_process(
    tmp_path: Path, data: dict[str, Path], evaluated: Path
) -> None:
    layouts = {
        2: {"TP2": [TP], "PP2": [PP], "DP2": [DISTRIBUTED], "PP2xVPP2": [PP, VPP]},
        4: {"overlapped": [PP, VPP, *OVERLAP], "TP2xDP2": [TP, *OVERLAP]},
    }
    reference = evaluations(metrics(evaluated))
    for world, runs in layouts.items():
        folders = {tmp_path / name: extra for name, extra in runs.items()}
        folders |= {tmp_path / f"{name}-evaluated": validating(data, *extra) for name, extra in runs.items()}
        rows = train_runs(world, data["near"], folders)
        weights = dict(zip(folders, final_weights(*folders), strict=True))
        for name in runs:
            without, with_ = tmp_path / name, tmp_path / f"{name}-evaluated"
            assert of_training(rows[with_]) == without_times(rows[without]), name
            assert all(torch.equal(weights[with_][k], w) for k, w in weights[without].items()), name
            found = evaluations(rows[with_])
            assert found.keys() == reference.keys()
            for step, values in reference.items():
                assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-7), (name, step)


def rank_nll(rank: int, folder: Path, cache: str) -> tuple[float, int]:
    """Mean NLL and number of decisions of a run's model, a trajectory at a time."""
    from pear_megatron.megatron.checkpoint.load_model import load_run
    from pear_megatron.megatron.forward_step import PearForwardStep

    be_quiet()
    model, recipe = load_run(folder)
    dataset = TrajectoryDataset.open(cache)
    step = PearForwardStep(recipe.pear, vocab_size=recipe.model.vocab_size)
    total, count = 0.0, 0.0
    for i in range(len(dataset)):
        batch = collate(dataset, [[i]], recipe.data.seq_length)
        output, loss = step(iter([batch]), model)
        nll, decisions = loss(output)[2]["nll"].tolist()
        total, count = total + nll, count + decisions
    return total / count, round(count)


def test_every_trajectory_counts_once(tmp_path: Path, data: dict[str, Path], evaluated: Path) -> None:
    config = DataConfig(train=str(data["held_out"]), seq_length=64, cache_dir=str(tmp_path))
    ((nll, decisions),) = run_ranks(1, rank_nll, evaluated, str(prepare(config)))
    last = evaluations(metrics(evaluated))[4]
    assert last["validation/nll"] == pytest.approx(nll, rel=1e-5)
    assert (last["validation/decisions"], last["validation/trajectories"]) == (decisions, 13)


def test_without_an_interval_it_looks_at_the_start_and_the_end(tmp_path: Path, data: dict[str, Path]) -> None:
    (rows,) = train_runs(
        1, data["near"], {tmp_path / "run": [f"data.validation={data['held_out']}"]}
    ).values()
    assert sorted(evaluations(rows)) == [0, 4]
    assert rows[0].keys() == {"step", *evaluations(rows)[0], "validation/seconds"}


def test_sources_of_held_out_trajectories_are_told_apart(tmp_path: Path, data: dict[str, Path]) -> None:
    sources = f"data.validation=[{{path:{data['held_out']},name:a}},{{path:{data['far']},name:b}}]"
    (rows,) = train_runs(1, data["near"], {tmp_path / "run": [sources]}).values()
    last = rows[-1]
    counts = [last[f"validation/source/{name}/decisions"] for name in "ab"]
    assert sum(counts) == last["validation/decisions"]
    for key in ("nll", "loss", "pear/weight"):
        parts = [last[f"validation/source/{name}/{key}"] for name in "ab"]
        mean = math.fsum(n * x for n, x in zip(counts, parts, strict=True)) / sum(counts)
        assert mean == pytest.approx(last[f"validation/{key}"], rel=1e-5)
    assert not any(key.startswith("source/") for key in last)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.eval_interval=2", "train.eval_interval 2 needs held-out trajectories"),
        ("checkpoint.keep_best=validation/nll", "checkpoint.keep_best validation/nll needs held-out"),
        ("data.validation=/nowhere.jsonl", "check data.validation"),
        ("checkpoint.export_interval=3", "must be a multiple of save_interval, which is None"),
        ("train.profile={start:3,stop:2}", "stop 2 comes before start 3"),
        ("train.profile={start:9,stop:9}", "train.profile.start 9 comes after the run's last step, 4"),
        ("train.profile={start:1,stop:1,ranks:[1]}", "there is no rank 1 among 1"),
        ("train.loss_normalization=trajectories", "train.loss_normalization"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(
    tmp_path: Path, data: dict[str, Path], override: str, said: str
) -> None:
    (message,) = failures(1, data["near"], tmp_path / "run", override)
    assert said in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_held_out_files_that_are_trained_on_are_named(
    tmp_path: Path, data: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    from pear_megatron.recipe import load_recipe
    from pear_megatron.train.dataset import open_dataset, open_validation
    from tests.megatron.runs import TINY

    overrides = [f"data.train={data['near']}", f"data.validation={data['near']}", f"output_dir={tmp_path}"]
    recipe = load_recipe(TINY, [*SMALL, *overrides])
    open_validation(recipe, open_dataset(recipe))
    assert "near.jsonl is in data.train too" in caplog.text


def test_held_out_trajectories_that_are_trained_on_are_counted(
    tmp_path: Path, data: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    from pear_megatron.recipe import load_recipe
    from pear_megatron.train.dataset import open_dataset, open_validation
    from tests.megatron.runs import TINY

    mixed = tmp_path / "mixed.jsonl"
    shared = [line.replace("trajectory-", "again-") for line in data["near"].read_text().splitlines()[:5]]
    rows = [*data["held_out"].read_text().splitlines(), *shared]
    mixed.write_text("\n".join(rows) + "\n")

    def opened(validation: Path) -> None:
        overrides = [f"data.train={data['near']}", f"data.validation={validation}", f"output_dir={tmp_path}"]
        recipe = load_recipe(TINY, [*SMALL, *overrides])
        open_validation(recipe, open_dataset(recipe))

    opened(data["held_out"])
    assert "data.validation" not in caplog.text
    opened(mixed)
    assert "5 of the 18 held-out trajectories that were looked at are in data.train too" in caplog.text
