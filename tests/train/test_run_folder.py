"""What a run leaves behind: metrics, TensorBoard, W&B, and what may change when it goes on."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron.errors import CheckpointError
from pear_megatron.plan import GPUS
from pear_megatron.recipe import RecipeError, load_recipe
from pear_megatron.train.run_folder import RunFolder, check_same_run
from pear_megatron.train.throughput import Throughput, peak_flops
from pear_megatron.train.weights_and_biases import RUN_ID, check_wandb, start_wandb
from tests.distributed import run_ranks
from tests.full_disk import files_up_to
from tests.megatron.ranks import train_runs
from tests.megatron.runs import TINY, Started, run_entry_point, write_trajectories


def _metrics(step: int, **more: float) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 0,
        "loss": 1.0 / step,
        "grad_norm": 1.0,
        "lr": 1e-5,
        "step_seconds": 0.5,
        "tokens_per_second": 100.0,
        "pear/weight": 0.9,
        **more,
    }


def _recipe(folder: Path, *overrides: str) -> Any:
    return load_recipe(TINY, ["data.train=x.jsonl", f"output_dir={folder}", *overrides])


def _write(folder: Path, steps: range, *overrides: str) -> None:
    recipe = _recipe(folder, *overrides)
    run = RunFolder(recipe, start_step=steps.start - 1, total_steps=10, wandb=start_wandb(recipe))
    for step in steps:
        run.log_step(_metrics(step))
    run.close()


def _tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_metrics_are_lines_of_json_and_tensorboard_scalars(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    scalars = _tensorboard(tmp_path)
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3]
    assert {"train/step_seconds", "train/tokens_per_second", "pear/weight"} <= scalars.keys()


def test_steps_that_are_trained_again_replace_the_lost_ones(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 5))
    _write(tmp_path, range(3, 6))  # from the checkpoint of step 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [step for step, _ in _tensorboard(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "override",
    [
        "cluster.num_nodes=4",
        "logging.wandb_project=p",
        "parallel.tensor_model_parallel_size=2",
        "train.output_chunk_tokens=512",
    ],
)
def test_a_run_may_go_on_elsewhere_and_log_elsewhere(tmp_path: Path, override: str) -> None:
    _write(tmp_path, range(1, 2))
    check_same_run(tmp_path, _recipe(tmp_path, override))


def test_a_run_may_not_go_on_with_other_settings(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 2))
    with pytest.raises(RecipeError, match=r"other settings: pear\.gamma 0.999 -> 0.9;"):
        check_same_run(tmp_path, _recipe(tmp_path, "pear.gamma=0.9"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="W&B is installed")
def test_wandb_that_is_not_installed_is_named_with_the_extra(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"wandb is not installed; pip install 'pear-megatron\[wandb\]'"):
        check_wandb(_recipe(tmp_path, "logging.wandb_project=p"))


def test_no_project_needs_no_wandb(tmp_path: Path) -> None:
    check_wandb(_recipe(tmp_path))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The real W&B, which reads the environment once, for as long as a test takes."""
    module = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield monkeypatch
    module.teardown()


def test_wandb_goes_on_under_one_id_when_a_run_goes_on(tmp_path: Path, wandb: pytest.MonkeyPatch) -> None:
    wandb.setenv("WANDB_MODE", "offline")
    project = ["logging.wandb_project=pear", "logging.wandb_name=mine"]
    _write(tmp_path, range(1, 4), *project)
    _write(tmp_path, range(3, 6), *project)
    name = (tmp_path / RUN_ID).read_text()
    written = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert written
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == len(written)
    stored = b"".join(path.read_bytes() for path in written)
    for said in (b"train/loss", b"pear/weight", b"mine", b"log_ratio_clip"):
        assert said in stored


def test_wandb_without_a_login_is_an_error_with_a_way_out(tmp_path: Path, wandb: pytest.MonkeyPatch) -> None:
    wandb.setenv("WANDB_MODE", "online")
    wandb.setenv("HOME", str(tmp_path))  # no ~/.netrc
    wandb.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # and nobody answers
    wandb.setenv("WANDB_INIT_TIMEOUT", "2")
    with pytest.raises(RecipeError, match="WANDB_MODE=offline"):
        _write(tmp_path, range(1, 2), "logging.wandb_project=pear")


def test_a_training_run_logs_its_speed_and_pears_diagnostics(tmp_path: Path) -> None:
    train_runs(1, write_trajectories(tmp_path / "data.jsonl"), {tmp_path / "run": []})
    scalars = _tensorboard(tmp_path / "run")
    assert {"train/step_seconds", "train/tokens_per_second", "train/grad_norm", "train/lr"} <= scalars.keys()
    assert {"pear/effective_sample_size", "pear/weight_at_floor"} <= scalars.keys()
    assert "train/mfu" not in scalars  # a CPU has no peak to divide by


def test_speed_on_a_cpu_is_tokens_and_seconds(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    speed = Throughput(recipe.model, recipe.cluster, world_size=2, device=torch.device("cpu"))
    assert speed([30, 70], 0.5) == {"step_seconds": 0.5, "tokens_per_second": 200.0}


def _speed_of_a_gpu(rank: int) -> dict[str, float]:
    device = torch.device("cuda", torch.cuda.current_device())
    name = next((name for name in GPUS if name.split("-")[0] in torch.cuda.get_device_name()), "cpu")
    recipe = load_recipe(TINY, ["data.train=x.jsonl", f"cluster.gpu={name}"])
    held = torch.ones(2**28, device=device)  # 1 GiB
    figures = Throughput(recipe.model, recipe.cluster, world_size=1, device=device)([128] * 4, 0.5)
    return figures | {"held": held.numel() * 4 / 2**30}


@pytest.mark.gpu
def test_speed_on_a_gpu_has_flops_and_memory() -> None:
    (figures,) = run_ranks(1, _speed_of_a_gpu, device="cuda", backend="nccl")
    assert figures["memory_allocated_gib"] >= figures["held"] == 1
    assert figures["memory_reserved_gib"] >= figures["memory_allocated_gib"]
    assert figures["tokens_per_second_per_gpu"] == figures["tokens_per_second"] == 1024
    assert figures["tflops_per_gpu"] > 0


def test_peak_is_the_recipes_gpu_if_the_device_is_that(caplog: pytest.LogCaptureFixture) -> None:
    assert peak_flops("H100-80GB", "NVIDIA H100 80GB HBM3") == GPUS["H100-80GB"].bf16_flops
    assert peak_flops("A100-80GB", "NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("H200-141GB", "NVIDIA H200") == 989e12
    with caplog.at_level(logging.WARNING, logger="pear_megatron"):
        assert peak_flops("H100-80GB", "NVIDIA A100-SXM4-80GB") is None
    assert "cluster.gpu is H100-80GB and this is a NVIDIA A100-SXM4-80GB" in caplog.text


def test_mfu_is_shown_where_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(_recipe(tmp_path), start_step=0, total_steps=1)
    run.log_step(_metrics(1, mfu=0.412))
    run.close()
    assert "MFU 41.2%" in capsys.readouterr().err


def test_checkpoints_without_the_settings_of_their_run_are_not_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no config.yaml.*checkpoint.pretrained="):
        check_same_run(tmp_path, _recipe(tmp_path))


def test_where_the_trajectories_lie_may_change(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 2))
    for moved in ("data.train=/elsewhere/x.jsonl", "data.tokenizer=/elsewhere/model"):
        check_same_run(tmp_path, _recipe(tmp_path, moved))
    with pytest.raises(RecipeError, match=r"optimizer.lr 0.001 -> 0.5"):
        check_same_run(tmp_path, _recipe(tmp_path, "optimizer.lr=0.5"))


def test_damaged_metrics_do_not_stop_a_run_that_goes_on(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n["step"]\n\xff\xfe\x00garbage\n{"step": "x"}\n')
    _write(tmp_path, range(4, 5))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]


@pytest.mark.usefixtures("capsys")  # pytest's own file must not grow either
def test_rows_that_a_full_disk_does_not_take_wait_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.excepthook", lambda of: None)  # of TensorBoard's thread
    run = RunFolder(_recipe(tmp_path), start_step=0, total_steps=10)
    run.log_step(_metrics(1))
    with files_up_to(300):
        for step in range(2, 6):
            run.log_step(_metrics(step))
    assert caplog.text.count("its rows wait in memory") == 1
    assert len((tmp_path / "metrics.jsonl").read_bytes()) == 300
    run.log_step(_metrics(6))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))
    with files_up_to(300):
        run.log_step(_metrics(7))
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl lacks its last 1 rows"):
            run.close()


def _with_packages_of(site: str, rank: int, world: int, port: int, output: Any, arguments: list[str]) -> None:
    sys.path.insert(0, site)
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]
    run_entry_point(rank, world, port, output, arguments)


def test_wandb_that_does_not_start_is_said_before_data_are_read(tmp_path: Path) -> None:
    (tmp_path / "site" / "wandb").mkdir(parents=True)
    (tmp_path / "site" / "wandb" / "__init__.py").write_text("import of_a_package_that_is_missing\n")
    overrides = ["data.train=/nowhere.jsonl", "logging.wandb_project=pear", f"output_dir={tmp_path / 'out'}"]
    started = Started(2, *overrides, target=partial(_with_packages_of, str(tmp_path / "site")))
    assert started.wait() == [1, 1]
    assert started.output(0).startswith("error: logging.wandb_project pear: W&B cannot be started: No module")
    assert started.output(1) == ""
