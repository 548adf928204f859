"""Blends train in their shares on every layout, resume, and say which source's ratios collapse."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron.loss import REPORT_KEYS
from tests.megatron.ranks import failures, final_weights, train_runs
from tests.megatron.runs import launch, metrics, without_times
from tests.megatron.test_layouts import DISTRIBUTED, PP, TP, VPP, assert_same_run
from tests.megatron.test_resume import interrupted_copy

SAVING = "checkpoint.save_interval=2"
# Raw log ratios of the far source are below every bound, so that all its log weights are at the floor's.
FAR_COLLAPSES = "pear.log_weight_clip=[-1,5]"


def blended(data: dict[str, Path], weights: tuple[float, float] | None, *more: str) -> list[str]:
    names = ("near", "far")
    parts = [f"path:{data[name]},name:{name}" for name in names]
    if weights is not None:
        parts = [f"{part},weight:{weight}" for part, weight in zip(parts, weights, strict=True)]
    return [f"data.train=[{','.join(f'{{{part}}}' for part in parts)}]", *more]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("blend") / "run"
    train_runs(1, data["near"], {folder: blended(data, (1, 3), SAVING)})
    return folder


def test_without_weights_it_is_the_files_together_bit_for_bit(tmp_path: Path, data: dict[str, Path]) -> None:
    renamed = tmp_path / "far.jsonl"  # ids are unique within a source, and in files alone
    renamed.write_text(data["far"].read_text().replace("trajectory-", "far-"))
    files, blend = tmp_path / "files", tmp_path / "blend"
    runs = {files: [f"data.train=[{data['near']},{renamed}]"], blend: blended(data, None)}
    rows = train_runs(1, data["near"], runs)
    of_all = [
        {k: v for k, v in row.items() if not k.startswith("source/")} for row in without_times(rows[blend])
    ]
    assert of_all == without_times(rows[files])
    weights = final_weights(files, blend)
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


def test_sources_add_up_to_the_whole(one_process: Path) -> None:
    for row in metrics(one_process):
        counts = [row[f"source/{name}/decisions"] for name in ("near", "far")]
        assert sum(counts) == row["decisions"]
        for key in set(REPORT_KEYS) - {"pear/effective_sample_size"}:  # a mean over trajectories
            parts = [n * row[f"source/{name}/{key}"] for n, name in zip(counts, ("near", "far"), strict=True)]
            assert math.fsum(parts) / row["decisions"] == pytest.approx(row[key], rel=1e-5, abs=1e-7), key


def test_epochs_of_a_source_follow_its_weight(tmp_path: Path, data: dict[str, Path]) -> None:
    """30 and 12 trajectories, weights 1 to 3: an epoch of 42 draws 10.5 and 31.5."""
    (rows,) = train_runs(
        1,
        data["near"],
        {tmp_path / "run": blended(data, (1, 3), "train.max_steps=null", "train.num_epochs=2")},
    ).values()
    assert rows[-1]["source/near/epoch"] == pytest.approx(21 / 30)
    assert rows[-1]["source/far/epoch"] == pytest.approx(63 / 12)
    assert all(a["source/far/epoch"] <= b["source/far/epoch"] for a, b in pairwise(rows))


@pytest.mark.slow
def test_every_layout_trains_and_tells_apart_as_one_process(
    tmp_path: Path, data: dict[str, Path], one_process: Path
) -> None:
    layouts = {
        1: {"micro-batches-of-one": ["train.micro_batch_size=1"]},
        2: {"TP2": [TP], "PP2xVPP2": [PP, VPP]},
        4: {"TP2xPP2": [TP, PP], "PP2xDP2": [PP, DISTRIBUTED]},
    }
    (reference,) = final_weights(one_process)
    for world, runs in layouts.items():
        folders = {tmp_path / name: blended(data, (1, 3), *extra) for name, extra in runs.items()}
        for rows in train_runs(world, data["near"], folders).values():
            assert_same_run(rows, metrics(one_process), relative=1e-5)
        for weights in final_weights(*folders):
            for name, expected in reference.items():
                torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-5)


def test_it_resumes_bit_for_bit(tmp_path: Path, data: dict[str, Path], one_process: Path) -> None:
    copy = interrupted_copy(one_process, tmp_path / "run", 2)
    (rows,) = train_runs(1, data["near"], {copy: blended(data, (1, 3))}).values()
    assert without_times(rows) == without_times(metrics(one_process))
    weights = final_weights(copy, one_process)
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


def test_other_weights_do_not_continue_a_run(
    tmp_path: Path, data: dict[str, Path], one_process: Path
) -> None:
    copy = interrupted_copy(one_process, tmp_path / "run", 2)
    (message,) = failures(1, data["near"], copy, *blended(data, (1, 2)))
    assert "data.train's weights (blend {" in message


def test_a_file_of_two_sources_is_named(tmp_path: Path, data: dict[str, Path]) -> None:
    twice = {"near": data["near"], "far": data["near"]}
    (message,) = failures(1, data["near"], tmp_path / "run", *blended(twice, None))
    assert "near.jsonl: in source near and in source far" in message


def test_what_is_wrong_with_a_source_names_it(tmp_path: Path, data: dict[str, Path]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input_ids": [1, 2], "loss_mask": [0, 1]}\n')
    (message,) = failures(1, data["near"], tmp_path / "run", *blended({**data, "far": bad}, None))
    assert "source far: " in message
    assert "bad.jsonl:1: " in message


def test_the_log_names_the_source_that_collapses_and_the_epochs_of_each(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    run = tmp_path / "run"
    more = [f"output_dir={run}", "train.max_steps=1", FAR_COLLAPSES, "pear.log_ratio_clip=[-1,1]"]
    said = launch(1, *blended(data, (1, 3)), *more).stderr
    assert re.search(r"step 1, source far: \d+% of the weights are at their floor", said)
    assert not re.search(r"source near: \d+% of", said)
    assert "source far: 12 trajectories, " in said
    assert ", weight 3: " in said
    row: dict[str, Any] = metrics(run)[0]
    assert row["source/far/pear/weight_at_floor"] > 0.5 > row["source/near/pear/weight_at_floor"]
