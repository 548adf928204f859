"""verl's own SFT trainer trains with PEAR as the one-rank loss says: its program, engines, micro-batches and metrics.

Needs VERL_DIR, a checkout of verl, and what verl imports (ray, tensordict, torchdata, codetiming, ...). Its platform
is a CPU's (verl_cpu), and mbridge, which needs Transformer Engine, is stood in for (verl_bridge).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from pear_megatron import PearConfig
from tests.adapters import one_rank
from tests.adapters.checkouts import needs_checkout
from tests.adapters.one_rank import assert_same
from tests.adapters.tiny_llama import save_tiny_llama
from tests.adapters.torchrun import torchrun
from tests.adapters.verl_bridge import NO_ATTENTION
from tests.megatron.runs import write_trajectories

CHECKOUT = os.environ.get("VERL_DIR", "")
_NEEDED = (
    "megatron.training",
    "ray",
    "tensordict",
    "torchdata",
    "codetiming",
    "hydra",
    "transformers",
    "peft",
)
pytestmark = needs_checkout("verl", "VERL_DIR", _NEEDED)

ROWS, BATCH, STEPS, LEARNING_RATE = 32, 8, 3, 1e-4
# Bounds that keep the weights small, so that they do not multiply rounding; the other has most weights at its floor.
PEAR = PearConfig(log_ratio_clip=(-0.05, 0.05), log_weight_clip=(-1.0, 0.7))
COLLAPSED = PearConfig(log_ratio_clip=(-0.05, 0.05), log_weight_clip=(0.5, 1.0))
COMMON = (
    f"optim.lr={LEARNING_RATE}", "optim.weight_decay=0", f"data.train_batch_size={BATCH}",
    "data.micro_batch_size_per_gpu=2", "data.use_dynamic_bsz=False", "data.num_workers=0", "data.max_length=64",
    "trainer.device=cpu", "trainer.logger=[console]", f"trainer.total_training_steps={STEPS}",
    "trainer.total_epochs=1", "trainer.resume_mode=disable", "hydra.output_subdir=null",
)  # fmt: skip
FSDP = (
    "engine.strategy=fsdp2", "engine.model_dtype=fp32", "engine.use_torch_compile=False",
    *(f"+engine.mixed_precision.{name}_dtype=fp32" for name in ("param", "reduce", "buffer")),
    "model.use_remove_padding=False", "model.enable_gradient_checkpointing=False",
    "+model.override_config.attn_implementation=eager",
)  # fmt: skip
MEGATRON = (
    "engine=megatron",
    "optim=megatron",
    "engine.vanilla_mbridge=True",
    "engine.sequence_parallel=False",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer in model/, and rows in data.jsonl."""
    root = tmp_path_factory.mktemp("verl")
    save_tiny_llama(root / "model")
    write_trajectories(root / "data.jsonl", ROWS)
    return root


def train(
    folder: Path,
    ranks: int,
    *settings: str,
    pear: PearConfig | None = PEAR,
    program: str = "pear_megatron.adapters.verl",
    **environment: str,
) -> tuple[list[dict[str, float]], str]:
    """verl's program on some ranks -> a dict of metrics per step, and all that it said."""
    command = [program, f"model.path={folder / 'model'}", f"data.train_files={folder / 'data.jsonl'}"]
    command += [f"trainer.default_local_dir={folder / 'checkpoints'}", f"hydra.run.dir={folder / 'hydra'}"]
    for name in ("log_ratio_clip", "log_weight_clip") if pear else ():
        command.append(f"+pear.{name}={list(getattr(pear, name))}")
    of_verl = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "HYDRA_FULL_ERROR": "1", **environment}
    command += [*settings, *COMMON]
    done = torchrun(ranks, "tests.adapters.verl_cpu", command, folder=folder, checkout=CHECKOUT, **of_verl)
    assert done.returncode == 0, done.stdout[-8000:]
    lines = [line for line in done.stdout.splitlines() if "step:" in line and "train/loss:" in line]
    steps = [
        {name: float(value) for name, value in re.findall(r"(\S+):([-+.\deE]+)(?: - |$)", line)}
        for line in lines
    ]
    return steps, done.stdout


def expected(folder: Path, pear: PearConfig = PEAR, *, attention: bool = True) -> list[dict[str, float]]:
    """Of every step: loss, gradient norm, report and decisions of the one-rank loss, as verl calls them."""
    # DistributedSampler's order of the first epoch; a batch of two ranks is the same eight rows.
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    batches = tuple(tuple(order[step * BATCH :][:BATCH]) for step in range(STEPS))
    steps, _ = one_rank.expected(
        folder, pear, seq_length=63, learning_rate=LEARNING_RATE, batches=batches, betas=(0.9, 0.999),
        attention=attention,
    )  # fmt: skip
    masks = [json.loads(line)["loss_mask"] for line in (folder / "data.jsonl").read_text().splitlines()]
    of_training = ("loss", "nll", "grad_norm")
    return [
        {f"train/{name}" if name in of_training else name: value for name, value in step.items()}
        | {"train/decisions": sum(sum(masks[i]) for i in own)}
        for step, own in zip(steps, batches, strict=True)
    ]


def test_fsdp_trains_as_the_loss_says(folder: Path) -> None:
    steps, said = train(folder, 1, *FSDP)
    assert_same(steps, expected(folder))
    assert "of the weights are at" not in said


def test_fsdp_on_two_ranks_trains_as_one_and_says_that_weights_collapse(folder: Path) -> None:
    steps, said = train(folder, 2, *FSDP, pear=COLLAPSED)
    assert_same(steps, expected(folder, COLLAPSED))
    assert steps[0]["pear/weight_at_floor"] > 0.5
    assert (
        said.count(f"step 1: {100 * steps[0]['pear/weight_at_floor']:.0f}% of the weights are at their floor")
        == 1
    )


def test_variant_none_is_verls_own_sft(folder: Path) -> None:
    """Its program on the same rows, with rewards of 1 and a validation."""
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    plain = folder / "plain.jsonl"
    plain.write_text("".join(json.dumps({**row, "reward": 1.0}) + "\n" for row in rows))
    settings = (*FSDP, f"data.train_files={plain}", f"data.val_files={plain}", "trainer.test_freq=-1")
    own = ("data.custom_cls.path=pkg://pear_megatron.adapters.verl.data", "data.custom_cls.name=PearDataset")
    wanted, said = train(folder, 1, *settings, *own, pear=None, program="verl.trainer.sft_trainer")
    steps, ours = train(folder, 1, *settings, "+pear.variant=none", pear=None)
    names = ("train/loss", "train/grad_norm")
    assert_same(steps, [{name: step[name] for name in names} for step in wanted])
    losses = [float(re.findall(r"step:3 - val/loss:([\d.]+)", text)[0]) for text in (ours, said)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_megatron_trains_in_tensor_parallel_as_one_rank_does(folder: Path) -> None:
    settings = (*MEGATRON, "engine.tensor_model_parallel_size=2", "model.use_remove_padding=False")
    assert_same(train(folder, 2, *settings)[0], expected(folder))


def test_megatron_trains_in_context_parallel_as_one_rank_does(folder: Path) -> None:
    """Packed rows, and the token counts of calculate_per_token_loss, which verl rounds down."""
    steps, _ = train(
        folder,
        2,
        *MEGATRON,
        "engine.context_parallel_size=2",
        "model.use_remove_padding=True",
        "+engine.override_transformer_config.calculate_per_token_loss=True",
        **{NO_ATTENTION: "1"},
    )
    assert_same(steps, expected(folder, attention=False))
