"""Hugging Face's Trainer trains with PEAR as the one-rank loss says: accumulation, processes, evaluation, resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron import PearConfig, pear_loss
from pear_megatron.data import DataConfig
from pear_megatron.errors import RecipeError
from tests.adapters import one_rank
from tests.adapters.one_rank import loss_of, means
from tests.adapters.tiny_llama import VOCABULARY, save_tiny_llama
from tests.adapters.torchrun import REPOSITORY, torchrun
from tests.megatron.runs import launch, run_program, write_trajectories

pytest.importorskip("transformers")

ROWS, STEPS, LEARNING_RATE = 8, 3, 1e-3
PACKED_ROWS, PACKED = 4, ("--seq_length=94", "--packing=True")  # what ROWS come to in rows of 94 positions
# Bounds that keep the weights small, so that they do not multiply rounding.
PEAR = PearConfig(variant="token", log_ratio_clip=(-0.05, 0.05), log_weight_clip=(-1.0, 0.7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer in model/, eight rows in data.jsonl and three in heldout.jsonl."""
    root = tmp_path_factory.mktemp("transformers")
    save_tiny_llama(root / "model")
    write_trajectories(root / "data.jsonl", ROWS)
    write_trajectories(root / "heldout.jsonl", 3, seed=1)
    (root / "pear.json").write_text(PEAR.model_dump_json())
    return root


def settings(folder: Path, output: Path, processes: int, rows: int) -> list[str]:
    """Options of the example: every step sees all rows, whatever their order."""
    given = {
        "model": folder / "model",
        "data": folder / "data.jsonl",
        "pear": folder / "pear.json",
        "output_dir": output,
        "seq_length": 63,
        "packing": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": rows // 2 // processes,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
    }
    return [f"--{name}={value}" for name, value in given.items()]


def program(
    folder: Path,
    output: Path,
    *options: str,
    processes: int = 1,
    rows: int = ROWS,
    module: str = "examples.transformers.sft_pear",
    as_a_user: bool = False,
) -> tuple[int, str]:
    """The example on some processes -> its exit code and what it said.

    They are forked from a server, which is quicker than ``as_a_user``: by Python or torchrun.
    """
    given = [*settings(folder, output, processes, rows), *options]
    if not as_a_user:
        target = partial(run_program, module, by_torchrun=processes > 1)
        done = launch(processes, *given, check=False, config=None, target=target)
    elif processes > 1:
        done = torchrun(processes, module, given, folder=REPOSITORY)
    else:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, *given],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return done.returncode, done.stdout + (done.stderr or "")


def train(folder: Path, output: Path, *options: str, **started: Any) -> list[dict[str, float]]:
    """The same -> the Trainer's log: a dict a step, and one of each evaluation."""
    code, said = program(folder, output, *options, **started)
    assert code == 0, said[-8000:]
    return json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]


def expected(folder: Path) -> list[dict[str, float]]:
    """Of every step, which takes all rows: loss, gradient norm and report of the one-rank loss."""
    return one_rank.expected(
        folder, PEAR, seq_length=63, learning_rate=LEARNING_RATE, batches=(tuple(range(ROWS)),) * STEPS,
        betas=(0.9, 0.999),
    )[0]  # fmt: skip


def assert_same(log: list[dict[str, float]], wanted: list[dict[str, float]], within: float = 1e-4) -> None:
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == len(wanted)
    for step, want in zip(steps, wanted, strict=True):
        assert {name: step[name] for name in want} == pytest.approx(want, rel=within, abs=within / 10)


def test_it_trains_as_the_loss_says(folder: Path, tmp_path: Path) -> None:
    assert_same(train(folder, tmp_path / "run", as_a_user=True), expected(folder))


def test_packed_rows_on_two_processes_train_as_the_loss_says(folder: Path, tmp_path: Path) -> None:
    log = train(folder, tmp_path / "run", *PACKED, processes=2, rows=PACKED_ROWS, as_a_user=True)
    assert_same(log, expected(folder))


FSDP = '{"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT"}'
ZERO = {
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def test_fsdp_trains_as_the_loss_says_and_resumes(folder: Path, tmp_path: Path) -> None:
    assert_sharded(folder, tmp_path, "--fsdp=full_shard", f"--fsdp_config={FSDP}")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_the_loss_says_and_resumes(folder: Path, tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "zero.json").write_text(json.dumps(ZERO | {"zero_optimization": {"stage": stage}}))
    assert_sharded(folder, tmp_path, f"--deepspeed={tmp_path / 'zero.json'}", as_a_user=True)


def assert_sharded(folder: Path, tmp_path: Path, *options: str, as_a_user: bool = False) -> None:
    module = "tests.adapters.sharded_on_cpu"
    sharded = {"processes": 2, "rows": PACKED_ROWS, "module": module, "as_a_user": as_a_user}
    output = tmp_path / "run"
    whole = train(folder, output, *PACKED, *options, **sharded)
    assert_same(whole, expected(folder))
    checkpoint = f"--resume_from_checkpoint={output / 'checkpoint-2'}"
    resumed = train(folder, output, *PACKED, *options, checkpoint, **sharded)
    assert resumed[-2]["loss"] == pytest.approx(whole[-2]["loss"], rel=1e-6)


def test_mixed_precision_and_recomputation_stay_within_rounding(folder: Path, tmp_path: Path) -> None:
    log = train(folder, tmp_path / "run", "--bf16", "--gradient_checkpointing")
    kept = (
        "loss",
        "nll",
        "grad_norm",
        "pear/weight",
    )  # shares of decisions at a bound move by whole decisions
    assert_same(log, [{name: step[name] for name in kept} for step in expected(folder)], within=5e-3)


def test_plain_sft_is_the_trainers_own_loss(folder: Path, tmp_path: Path) -> None:
    """On rewards of 1: the model's cross entropy over labels of -100 off the decisions."""
    from transformers import AutoModelForCausalLM

    rows = [json.loads(line) | {"reward": 1.0} for line in (folder / "data.jsonl").read_text().splitlines()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "none.json").write_text('{"variant": "none"}')
    options = [f"--data={tmp_path / 'data.jsonl'}", f"--pear={tmp_path / 'none.json'}"]
    first = train(folder, tmp_path / "run", *options)[0]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    total = decisions = 0.0
    for row in rows:
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["loss_mask"]]).bool()
        total += model(ids, labels=ids.where(mask, -100)).loss.item() * int(mask.sum())
        decisions += int(mask.sum())
    assert first["loss"] == pytest.approx(total / decisions, rel=1e-4)
    assert first["nll"] == pytest.approx(total / decisions, rel=1e-5)


def test_evaluations_are_ratios_of_sums_and_leave_training_as_it_is(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    given = f"--validation_data={folder / 'heldout.jsonl'}"
    options = [given, "--eval_strategy=steps", "--eval_steps=1", "--per_device_eval_batch_size=2"]
    log = train(folder, tmp_path / "run", *options)
    assert_same(log, expected(folder))
    evaluations = [entry for entry in log if "eval_nll" in entry]
    assert len(evaluations) == STEPS
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    heldout = one_rank.trajectories(folder / "heldout.jsonl", VOCABULARY, 63)
    with torch.no_grad():
        final = means(loss_of(trained, heldout, range(len(heldout)), PEAR)[2])
    assert evaluations[-1]["eval_nll"] == pytest.approx(final["nll"], rel=1e-5)
    assert evaluations[-1]["eval_pear/weight"] == pytest.approx(final["pear/weight"], rel=1e-4)


def test_a_run_resumes_under_its_own_loss_alone(folder: Path, tmp_path: Path) -> None:
    whole = train(folder, tmp_path / "run")
    resumed = train(folder, tmp_path / "run", f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}")
    assert resumed[-2]["loss"] == pytest.approx(whole[-2]["loss"], rel=1e-6)
    (tmp_path / "other.json").write_text(PEAR.model_copy(update={"gamma": 0.9}).model_dump_json())
    other = [
        f"--pear={tmp_path / 'other.json'}",
        f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}",
    ]
    code, said = program(folder, tmp_path / "run", *other)
    assert code == 1
    assert "the checkpoint was trained with pear {'gamma': 0.999}, this run has {'gamma': 0.9}" in said


@pytest.fixture
def attention() -> None:
    """``flash_on_cpu``, torch's attention under flash attention's name, and ``blind``, causal over the whole row."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def blind(module: Any, query: Any, key: Any, value: Any, _: Any, **rest: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, None, **rest)

    for name, function in (("flash_on_cpu", sdpa_attention_forward), ("blind", blind)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


def trainer_and_batch(folder: Path, attention: str, output: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, TrainingArguments

    from pear_megatron.adapters.transformers import PearCollator, PearTrainer, Trajectories

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.config._attn_implementation = attention  # from_pretrained looks for an installed flash attention
    data = DataConfig(train=[str(folder / "data.jsonl")], seq_length=94)
    rows = Trajectories(data, PEAR, vocab_size=VOCABULARY)
    assert len(rows) == PACKED_ROWS
    args = TrainingArguments(str(output), use_cpu=True, report_to="none")
    return PearTrainer(model, args, pear=PEAR, train_dataset=rows), PearCollator()(list(rows))


@pytest.mark.usefixtures("attention")
def test_flash_attention_gets_the_rows_as_one_and_the_loss_is_the_same(folder: Path, tmp_path: Path) -> None:
    seen = []
    losses = []
    for name in ("sdpa", "flash_on_cpu"):
        trainer, batch = trainer_and_batch(folder, name, tmp_path)
        trainer.model.register_forward_pre_hook(
            lambda _, args, given: (
                seen.append(tuple(given["input_ids"].shape)) if "input_ids" in given else None
            ),
            with_kwargs=True,
        )
        losses.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(100)).item())
    assert seen == [(PACKED_ROWS, 88), (1, PACKED_ROWS * 88)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.usefixtures("attention")
def test_a_model_that_reads_over_the_trajectories_of_a_row_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer, batch = trainer_and_batch(folder, "blind", tmp_path)
    with pytest.raises(RecipeError, match=r"lets packed trajectories see each other.*packing=False"):
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(100))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--label_smoothing_factor=0.1"], "label_smoothing_factor is no part of PEAR's loss"),
        (["--seq_length=20"], "data.jsonl:"),
    ],
)
def test_what_would_train_otherwise_is_refused_in_a_sentence(
    folder: Path, tmp_path: Path, options: list[str], expected: str
) -> None:
    code, said = program(folder, tmp_path / "run", *options)
    assert code == 1
    assert "error: " in said
    assert expected in said
    assert "Traceback" not in said


def test_processes_that_would_count_alike_are_refused(folder: Path, tmp_path: Path) -> None:
    code, said = program(folder, tmp_path / "run", "--average_tokens_across_devices=False", processes=2)
    assert code
    assert "however few decisions it has" in said


def test_a_mixtures_router_loss_is_a_mean_over_accumulated_micro_batches(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainingArguments

    from pear_megatron.adapters.transformers import PearCollator, PearTrainer, Trajectories

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, head_dim=8,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
            output_router_logits=True, router_aux_loss_coef=0.5,
        )
    )  # fmt: skip
    pear = PearConfig(variant="none")
    data = DataConfig(train=str(folder / "data.jsonl"), seq_length=63, packing=False)
    rows = Trajectories(data, pear, vocab_size=VOCABULARY)
    batches = [PearCollator()([rows[i], rows[i + 1]]) for i in range(0, ROWS, 2)]
    total, decisions, routers = 0.0, 0, 0.0
    for batch in batches:
        out, given = model(batch["input_ids"], attention_mask=batch["attention_mask"]), batch["trajectories"]
        columns = given["behavior_logprobs"], given["mask"], given["cu_seqlens"]
        loss, count, _ = pear_loss(out.logits, batch["labels"], *columns, pear, reward=given["reward"])
        total, decisions, routers = total + float(loss), decisions + int(count), routers + float(out.aux_loss)
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        learning_rate=0.0, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = PearTrainer(model, arguments, pear=pear, train_dataset=rows)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        total / decisions + 0.5 * routers / 4, rel=1e-5
    )
