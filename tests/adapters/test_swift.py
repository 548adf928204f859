"""Megatron-SWIFT's own trainer trains with PEAR as the one-rank loss says: its program, model, loop, logs, checkpoints.

Needs ms-swift and mcore-bridge (docs/adapters/swift.md); Transformer Engine's layers are replaced (swift_edge).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron import PearConfig
from pear_megatron.data import BatchPlan
from tests.adapters import one_rank
from tests.adapters.checkouts import needs_modules
from tests.adapters.one_rank import assert_same, loss_of, means
from tests.adapters.swift_edge import NO_ATTENTION
from tests.adapters.tiny_llama import VOCABULARY, save_tiny_llama
from tests.adapters.torchrun import REPOSITORY, torchrun
from tests.megatron.runs import write_trajectories

pytestmark = needs_modules("Megatron-SWIFT", ("swift", "mcore_bridge", "megatron.core", "modelscope"))

SEQ_LENGTH, BATCH, STEPS, LEARNING_RATE, SEED = 64, 4, 3, 1e-4, 42
# Bounds that keep the weights small, so that they do not multiply rounding; the other has most weights at its floor.
PEAR = PearConfig(log_ratio_clip=(-0.05, 0.05), log_weight_clip=(-1.0, 0.7))
COLLAPSED = PearConfig(log_ratio_clip=(-0.05, 0.05), log_weight_clip=(0.5, 1.0))
# What has no CPU: half precision's kernels, fused ones, NCCL. The rest is what a user would give.
COMMON = {
    "model_type": "llama", "template": "dummy", "check_model": False, "packing": True, "max_length": SEQ_LENGTH,
    "global_batch_size": BATCH, "train_iters": STEPS, "lr": LEARNING_RATE, "lr_decay_style": "constant",
    "weight_decay": 0, "logging_steps": 1, "add_version": False, "save_safetensors": False, "no_save_optim": True,
    "torch_dtype": "float32", "fp16": False, "bf16": False, "ddp_backend": "gloo", "use_cpu_initialization": True,
    "masked_softmax_fusion": False, "bias_dropout_fusion": False, "bias_activation_fusion": False,
    "gradient_accumulation_fusion": False, "megatron_extra_kwargs": '{"persist_layer_norm": false}',
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer in model/, and rows in data.jsonl and held_out.jsonl.

    Four layers make two stages of two chunks each; an odd vocabulary is padded at TP 2.
    """
    root = tmp_path_factory.mktemp("swift")
    save_tiny_llama(root / "model", num_hidden_layers=4, vocab_size=VOCABULARY + 1)
    write_trajectories(root / "data.jsonl", 32)
    write_trajectories(root / "held_out.jsonl", 9, seed=1)
    return root


def start(
    folder: Path,
    ranks: int,
    pear: PearConfig = PEAR,
    *,
    failing: bool = False,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> str:
    """The program on some ranks, with its options in a YAML file -> all that it said."""
    given = {
        "model": folder / "model", "dataset": folder / "data.jsonl", "output_dir": folder / "out", **COMMON, **options,
        **{f"pear_{name}": list(getattr(pear, name)) for name in ("log_ratio_clip", "log_weight_clip")},
    }  # fmt: skip
    file = Path(given["output_dir"]).with_suffix(".yaml")
    file.write_text("".join(f"{name}: {json.dumps(value, default=str)}\n" for name, value in given.items()))
    done = torchrun(ranks, "tests.adapters.swift_cpu", [str(file)], folder=folder, **(environment or {}))
    assert (done.returncode != 0) == failing, done.stdout[-8000:]
    return done.stdout


def train(folder: Path, ranks: int, *args: Any, **options: Any) -> tuple[list[dict[str, float]], str]:
    """The same -> the lines of its logging.jsonl, and all that it said."""
    output = folder / f"out-{len(list(folder.glob('out-*.yaml')))}"
    said = start(folder, ranks, *args, output_dir=output, **options)
    lines = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    return [line for line in lines if "iteration" in line], said


def expected(
    folder: Path, pear: PearConfig = PEAR, *, steps: int = STEPS, attention: bool = True
) -> tuple[list[dict[str, float]], Any]:
    return one_rank.expected(
        folder, pear, seq_length=SEQ_LENGTH, batch=BATCH, steps=steps, learning_rate=LEARNING_RATE, seed=SEED,
        multiple=1 if attention else 4, attention=attention,
    )  # fmt: skip


def test_it_trains_evaluates_and_saves_what_the_loss_says(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    lines, said = train(
        folder, 1, val_dataset=folder / "held_out.jsonl", eval_steps=STEPS, save_safetensors=True
    )
    wanted, model = expected(folder)
    assert_same([line for line in lines if "loss" in line], wanted)
    assert "PEAR: an epoch is 5 iterations; 0.60 epochs are asked for" in said
    assert "of the weights are at" not in said

    held_out = one_rank.trajectories(folder / "held_out.jsonl", VOCABULARY + 1, SEQ_LENGTH)
    with torch.no_grad():
        report = means(loss_of(model, held_out, list(range(len(held_out))), PEAR)[2])
    evaluations = [line for line in lines if "eval_loss" in line]
    assert_same(evaluations, [{f"eval_{name}": value for name, value in report.items()}])

    saved = AutoModelForCausalLM.from_pretrained(
        folder / "out-0" / f"checkpoint-{STEPS}", dtype=torch.float32
    )
    for (
        name,
        parameter,
    ) in model.state_dict().items():  # within a tenth of Adam's step, where a gradient is rounding
        torch.testing.assert_close(saved.state_dict()[name], parameter, rtol=1e-4, atol=LEARNING_RATE / 10)


def test_two_data_parallel_ranks_train_as_one_and_say_that_weights_collapse(folder: Path) -> None:
    lines, said = train(folder, 2, COLLAPSED, global_batch_size=BATCH * 16, train_iters=1)
    assert lines[0]["pear/weight_at_floor"] > 0.5
    assert said.count("of the weights are at their floor") == 1
    assert_same(train(folder, 2)[0], expected(folder)[0])


def test_tensor_and_sequence_parallel_ranks_train_as_one_for_an_epoch(folder: Path) -> None:
    lines, _ = train(folder, 2, tensor_model_parallel_size=2, sequence_parallel=True, num_train_epochs=1)
    assert_same(lines, expected(folder, steps=5)[0])


@pytest.mark.parametrize("chunks", [1, 2])
def test_pipeline_stages_train_as_one_on_micro_batches_of_two_rows(folder: Path, chunks: int) -> None:
    stages = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": chunks}
    assert_same(train(folder, 2, **stages, micro_batch_size=2)[0], expected(folder)[0])


def test_context_parallel_ranks_train_as_one(folder: Path) -> None:
    lines, _ = train(folder, 2, context_parallel_size=2, environment={NO_ATTENTION: "1"})
    assert_same(lines, expected(folder, attention=False)[0])


def test_lora_trains_on_and_its_merged_model_has_the_loss_of_the_next_step(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    options = {"tuner_type": "lora", "lora_dropout": 0, "save_safetensors": True, "save_steps": STEPS}
    lines, _ = train(folder, 1, **options, train_iters=STEPS + 1, lr=1e-2)
    assert lines[0]["loss"] == pytest.approx(expected(folder)[0][0]["loss"], rel=1e-5)
    (saved,) = folder.glob(f"out-*/checkpoint-{STEPS}-merged")
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, attn_implementation="eager")
    rows = one_rank.trajectories(folder / "data.jsonl", VOCABULARY + 1, SEQ_LENGTH)
    own = [i for row in BatchPlan(rows.lengths, SEQ_LENGTH, BATCH, seed=SEED).rows(STEPS)[1] for i in row]
    report = means(loss_of(model, rows, own, PEAR)[2])
    assert_same(lines[STEPS:], [report])
    before = means(loss_of(expected(folder, steps=0)[1], rows, own, PEAR)[2])
    assert abs(report["nll"] - before["nll"]) > 1e-3


def test_a_resumed_run_goes_on_where_it_was_and_refuses_another_loss(folder: Path) -> None:
    # The distributed optimizer loads nothing into torch's Adam, which stands for Transformer Engine's here.
    options = {"no_save_optim": False, "use_distributed_optimizer": False}
    first, _ = train(folder, 1, **options)
    checkpoint = max(folder.glob("out-*/checkpoint-*"), key=lambda path: path.stat().st_mtime)
    going_on = {"mcore_model": checkpoint, "finetune": False, "train_iters": 2 * STEPS, **options}
    then, _ = train(folder, 1, **going_on)
    assert_same(first + then, expected(folder, steps=2 * STEPS)[0])
    said = start(folder, 1, failing=True, **going_on, pear_variant="block")
    assert "was trained with --pear_variant token, and this run has block" in said


def test_options_of_ms_swift_that_are_looked_at_are_there() -> None:
    """One that is renamed would be looked at no more."""
    program = (
        "from tests.adapters import swift_edge; swift_edge.install();"
        "from pear_megatron.adapters.swift import program, settings;"
        "known = set(program.PearSftArguments.__dataclass_fields__);"
        "print('MISSING', ({name for name, *_ in settings._NEEDED} | set(settings._UNREAD)) - known)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert "MISSING set()" in done.stdout, done.stdout + done.stderr
