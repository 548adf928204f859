"""Megatron-Bridge's own finetune() trains with PEAR as our trainer does; what its configuration must say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pear_megatron.adapters import bridge
from pear_megatron.adapters.bridge import checks
from pear_megatron.cli import app
from pear_megatron.config import PearConfig
from pear_megatron.data import DataConfig
from pear_megatron.errors import RecipeError
from pear_megatron.report import WeightWatch
from tests.megatron.runs import train, write_trajectories

ROOT = Path(__file__).parents[2]
OURS = [
    "train.max_steps=10", "optimizer.lr_decay_style=constant", "optimizer.lr_warmup_steps=0",
    "optimizer.weight_decay=0.1", "optimizer.adam_beta2=0.95",
]  # fmt: skip


def _missing() -> str | None:
    checkout = os.environ.get("MEGATRON_BRIDGE_DIR")
    if checkout is None and importlib.util.find_spec("megatron.bridge") is None:
        return "megatron-bridge is not installed, and MEGATRON_BRIDGE_DIR does not name a checkout"
    absent = [
        name for name in ("megatron.training", "megatron.energon") if not importlib.util.find_spec(name)
    ]
    return f"what Megatron-Bridge imports is not installed: {', '.join(absent)}" if absent else None


needs_bridge = pytest.mark.skipif(_missing() is not None, reason=_missing() or "")


def settings(**changed: Any) -> SimpleNamespace:
    """What the checks read of a ConfigContainer, as it should be; ``changed`` by dotted name."""
    config = SimpleNamespace(
        model=SimpleNamespace(
            calculate_per_token_loss=True, seq_length=128, transformer_impl="transformer_engine"
        ),
        ddp=SimpleNamespace(average_in_collective=False),
        train=SimpleNamespace(micro_batch_size=1, num_epochs=None),
        validation=SimpleNamespace(eval_iters=0, eval_micro_batch_size=None),
        dist=SimpleNamespace(),
    )
    for name, value in changed.items():
        part, field = name.split("__")
        setattr(getattr(config, part), field, value)
    return config


def data(**changed: Any) -> DataConfig:
    return DataConfig(**{"train": ["scored.parquet"], "seq_length": 128, **changed})


def test_a_configuration_that_goes_with_pear_is_taken() -> None:
    checks.check(settings(), data(), None)
    local = settings(model__transformer_impl="local", train__micro_batch_size=4)
    checks.check(local, data(), None)
    assert (checks.packed_attention(settings()), checks.packed_attention(local)) == (
        "thd",
        "mask",
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model__calculate_per_token_loss": False}, "calculate_per_token_loss is false.*set it to True"),
        ({"ddp__average_in_collective": True}, "average_in_collective is true.*set it to False"),
        ({"model__seq_length": 256}, "data.seq_length is 128 and config.model.seq_length 256"),
        ({"train__micro_batch_size": 2}, "config.train.micro_batch_size is 2.*single row"),
        ({"validation__eval_micro_batch_size": 2}, "config.validation.eval_micro_batch_size is 2"),
        ({"train__num_epochs": 1}, "num_epochs needs Bridge's own data sets"),
        ({"train__rampup_batch_size": [2, 2, 8]}, "rampup_batch_size"),
        ({"train__decrease_batch_size_if_needed": True}, "decrease_batch_size_if_needed"),
        ({"validation__eval_iters": 2}, "eval_iters is 2 and there is no validation_data"),
        ({"dist__eval_context_parallel_size": 1}, "eval_context_parallel_size"),
        ({"model__cuda_graph_impl": "local"}, "cuda_graph_impl is 'local'"),
        ({"model__kd_config": object()}, "distils from a teacher"),
    ],
)
def test_what_would_silently_train_something_else_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        checks.check(settings(**changed), data(), None)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    config = settings(model__calculate_per_token_loss=False, ddp__average_in_collective=True)
    with pytest.raises(RecipeError, match=r"(?s)per_token_loss.*average_in_collective.*packing"):
        checks.check(config, data(packing=False), None)


def test_validation_data_that_nobody_reads_are_refused() -> None:
    with pytest.raises(RecipeError, match="validation_data would not be read"):
        checks.check(settings(), data(), ["held-out.parquet"])


def test_data_that_the_adapter_does_not_read_or_blend_are_refused() -> None:
    sources = data(train=[{"path": "a.parquet", "name": "a"}, {"path": "b.parquet", "name": "b"}])
    with pytest.raises(RecipeError, match="does not blend them"):
        checks.check(settings(), sources, None)
    with pytest.raises(RecipeError, match="data.validation would not be read"):
        checks.check(settings(), data(validation=["held-out.parquet"]), None)


def test_a_data_set_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(RecipeError, match="config.dataset is a SimpleNamespace.*config.dataset = None"):
        bridge.plug_in(SimpleNamespace(dataset=SimpleNamespace()), data=data(), pear=PearConfig())


def environment() -> dict[str, str]:
    """Of a process that finds these tests and Bridge's checkout."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if checkout := os.environ.get("MEGATRON_BRIDGE_DIR"):
        paths.insert(1, f"{checkout}/src")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(processes: int, output: Path, *arguments: str) -> str:
    """bridge_program.py under torchrun -> what it said."""
    torchrun = f"-W ignore -m torch.distributed.run --standalone --nproc-per-node={processes}".split()
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.adapters.bridge_program", "--output", str(output), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(re.findall(r"^.*(?:Error|error|File).*$", done.stdout, re.M)[-40:])
    return done.stdout


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our trainer's run from a checkpoint of random weights: the data, the checkpoint, the metrics."""
    folder = tmp_path_factory.mktemp("ours")
    path = write_trajectories(folder / "data.jsonl", 60)
    train(folder / "start", path, 1, "train.max_steps=1")
    start = folder / "start" / "checkpoints"
    rows = train(folder / "run", path, 1, *OURS, f"checkpoint.pretrained={start}")
    return {"data": path, "start": start, "rows": rows}


def compare(output: Path, rows: list[dict[str, Any]], rel: float = 1e-5) -> None:
    from tests.adapters.test_megatron_lm import scalars

    for name, key in (
        ("loss", "loss"), ("nll", "nll"), ("pear/weight", "pear/weight"), ("grad-norm", "grad_norm")
    ):  # fmt: skip
        assert scalars(output, name) == pytest.approx([row[key] for row in rows], rel=rel), name


def warnings(rows: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What our own trainer would say of the weights, step by step."""
    watch = WeightWatch(PearConfig(), "iteration {}")
    with caplog.at_level("WARNING", "pear_megatron"):
        for row in rows:
            watch(row)
    return caplog.messages


@needs_bridge
@pytest.mark.parametrize("layout", [["--tp", "2"], ["--pp", "2"], []], ids=["TP 2", "PP 2", "DP 2"])
def test_losses_and_gradient_norms_are_those_of_our_trainer(
    layout: list[str], ours: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ["--data", str(ours["data"]), "--weights", str(ours["start"]), *layout]
    said = run(2, tmp_path, *given)
    compare(tmp_path, ours["rows"])
    expected = warnings(ours["rows"], caplog)
    assert any("the mean weight is" in message for message in expected)
    assert [said.count(message) for message in expected] == [1] * len(expected), said[-3000:]
    assert said.count("PEAR: an epoch is") == 1


@needs_bridge
def test_a_run_goes_on_from_its_checkpoint_and_evaluates(ours: dict[str, Any], tmp_path: Path) -> None:
    given = ["--data", str(ours["data"]), "--weights", str(ours["start"]), "--save", str(tmp_path / "saved")]
    run(1, tmp_path / "first", *given, "--stop", "5")
    said = run(1, tmp_path / "rest", *given, "--validate", str(ours["data"]))
    compare(tmp_path / "rest", ours["rows"][5:])
    assert re.search(r"validation loss at iteration 10.*pear/weight value", said)


@needs_bridge
def test_lora_starts_from_the_base_model_trains_and_saves_adapters_alone(
    ours: dict[str, Any], tmp_path: Path
) -> None:
    from torch.distributed import checkpoint as distributed_checkpoint
    from torch.distributed.checkpoint import FileSystemReader

    from tests.adapters.test_megatron_lm import scalars

    saved = tmp_path / "saved"
    given = ["--data", str(ours["data"]), "--weights", str(ours["start"]), "--save", str(saved)]
    run(1, tmp_path, *given, "--lora", "8")
    for name in ("loss", "nll", "pear/weight"):
        assert scalars(tmp_path, name)[0] == pytest.approx(ours["rows"][0][name], rel=1e-5), name
    stored = next(saved.glob("iter_*"))
    names = FileSystemReader(stored).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(found.size)
        for name, found in names.items()
        if name.endswith(".weight") and not name.startswith("optimizer")
    }
    assert weights
    assert all(".adapter." in name for name in weights)
    distributed_checkpoint.load(weights, checkpoint_id=stored)  # linear_out is zero before the first step
    outer = [weight.any() for name, weight in weights.items() if ".linear_out." in name]
    assert outer
    assert all(outer)
    command = ["export", "--checkpoint", str(saved), "--hf", str(tmp_path), "--output", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, command)
    assert (refused.exit_code, "holds LoRA's adapters alone" in refused.stderr) == (1, True), refused.stderr
