"""torchtitan's own trainer trains with PEAR as the one-rank loss says: its program, model, ranks, logs, checkpoints.

Needs torchtitan (docs/adapters/torchtitan.md); titan_on_cpu says what is replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron import PearConfig
from tests.adapters import one_rank
from tests.adapters.checkouts import needs_modules
from tests.adapters.one_rank import assert_same, loss_of, means
from tests.adapters.tiny_llama import save_tiny_llama
from tests.adapters.torchrun import torchrun
from tests.megatron.runs import write_trajectories

pytestmark = needs_modules("torchtitan", ("torchtitan", "tensorboard", "triton"))

SEQ_LENGTH, VOCABULARY = 64, 2048  # as titan_configs has them
PEAR = PearConfig(log_ratio_clip=(-0.05, 0.05), log_weight_clip=(-1.0, 0.7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of torchtitan's shape with a tokenizer in model/, and rows in data.jsonl and held_out.jsonl."""
    root = tmp_path_factory.mktemp("torchtitan")
    save_tiny_llama(
        root / "model", vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=16, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    write_trajectories(root / "data.jsonl", 32)
    write_trajectories(root / "held_out.jsonl", 9, seed=1)
    return root


def start(folder: Path, ranks: int, output: Path, *options: str, failing: bool = False) -> str:
    """torchtitan's program -> all that it said."""
    module = ["--module=tests.adapters.titan_configs", "--config=tiny_llama", f"--dump_folder={output}"]
    done = torchrun(
        ranks, "tests.adapters.titan_on_cpu", [*module, *options], folder=folder, PEAR_TEST_FOLDER=str(folder)
    )
    assert (done.returncode != 0) == failing, done.stdout[-8000:]
    return done.stdout


def train(folder: Path, ranks: int, output: Path, *options: str) -> list[dict[str, float]]:
    """The same -> what its TensorBoard got of every step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(folder, ranks, output, *options)
    steps: dict[int, dict[str, float]] = {}
    for events in sorted(output.glob("tb/*/*")):
        board = EventAccumulator(str(events))
        board.Reload()
        for name in board.Tags()["scalars"]:
            for scalar in board.Scalars(name):
                steps.setdefault(scalar.step, {})[name] = scalar.value
    return [{**values, "loss": values["loss_metrics/global_avg_loss"]} for _, values in sorted(steps.items())]


def expected(folder: Path, pear: PearConfig = PEAR) -> tuple[list[dict[str, float]], Any]:
    return one_rank.expected(folder, pear, seq_length=SEQ_LENGTH, batch=4, steps=3, learning_rate=1e-3)


def test_it_trains_evaluates_and_saves_what_the_loss_says(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    lines = train(
        folder, 1, tmp_path / "out", "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"
    )
    wanted, model = expected(folder)
    assert_same(lines, wanted)
    saved = load_file(tmp_path / "out/checkpoint/step-3/model-00001-of-00001.safetensors")
    for name, parameter in model.state_dict().items():  # within Adam's step for a gradient that is rounding
        torch.testing.assert_close(saved[name], parameter, rtol=1e-4, atol=1e-3)

    held_out = one_rank.trajectories(folder / "held_out.jsonl", VOCABULARY, SEQ_LENGTH)
    with torch.no_grad():
        report = means(loss_of(model, held_out, list(range(len(held_out))), PEAR)[2])
    assert_same(lines[-1:], [{f"validation_metrics/{name}": value for name, value in report.items()}])


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ["--parallelism.data_parallel_shard_degree=2"]),
        (2, ["--parallelism.tensor_parallel_degree=2"]),
        (2, ["--parallelism.pipeline_parallel_degree=2"]),
        (
            2,
            [
                "--parallelism.pipeline_parallel_degree=2",
                "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
            ],
        ),
    ],
    ids=["FSDP 2", "TP 2", "PP 2", "two chunks a stage"],
)
def test_ranks_train_as_one(folder: Path, tmp_path: Path, ranks: int, options: list[str]) -> None:
    assert_same(train(folder, ranks, tmp_path / "out", *options), expected(folder)[0])


def test_a_resumed_run_goes_on_where_it_was_on_other_ranks_and_under_its_own_loss_alone(
    folder: Path, tmp_path: Path
) -> None:
    keep = "--checkpoint.no-last_save_model_only"
    train(folder, 1, tmp_path / "out", keep, "--training.steps=2")
    said = start(folder, 1, tmp_path / "out", keep, "--loss.pear.variant=sequence", failing=True)
    assert "CheckpointError: the checkpoint was trained with pear {'variant': 'token'}" in said
    lines = train(folder, 2, tmp_path / "out", "--parallelism.data_parallel_shard_degree=2")
    assert_same(lines, expected(folder)[0])


def test_settings_that_train_something_else_are_refused_in_one_list(folder: Path, tmp_path: Path) -> None:
    said = start(
        folder, 1, tmp_path / "out", "--training.no-disable_cuda_graphs", "--parallelism.spmd_backend=full_dtensor",
        "--parallelism.context_parallel_degree=2", "--parallelism.tensor_parallel_degree=3", failing=True,
    )  # fmt: skip
    for setting in (
        "training.disable_cuda_graphs", "spmd_backend", "context_parallel_degree", "tensor_parallel_degree"
    ):  # fmt: skip
        assert setting in said.split("RecipeError: ", 1)[1]
