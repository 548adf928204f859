"""Megatron-LM's own loop (``megatron.training``, megatron-core 0.19) trains with PEAR as our trainer does."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.runs import train, write_trajectories

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "megatron_lm" / "pretrain_pear.py"
STEPS = 10

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="this megatron-core has no megatron.training (0.19 has)",
)

# The tiny recipe in Megatron-LM's words.
MODEL = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --vocab-size 1000 --make-vocab-size-divisible-by 128 --max-position-embeddings 512
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --position-embedding-type rope --rotary-base 10000
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
"""
TRAINING = f"""
    --seq-length 128 --micro-batch-size 2 --global-batch-size 8 --train-iters {STEPS} --seed 1234
    --lr 1e-3 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
    --clip-grad 1.0 --calculate-per-token-loss --tokenizer-type NullTokenizer --eval-interval 5
    --tensorboard-log-interval 1 --log-interval 1 --ckpt-format torch_dist
"""
ON_CPU = """
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --rerun-mode disabled
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion
    --no-persist-layer-norm
"""
OURS = [
    "train.max_steps=10", "optimizer.lr_decay_style=constant", "optimizer.lr_warmup_steps=0",
    "optimizer.weight_decay=0.1", "optimizer.adam_beta2=0.95",
]  # fmt: skip


def pretrain(processes: int, output: Path, *arguments: str) -> tuple[int, str]:
    """Runs the example's program under torchrun -> its exit code and what it said."""
    torchrun = f"-W ignore -m torch.distributed.run --standalone --nproc-per-node={processes}".split()
    settings = f"{MODEL} {TRAINING} {ON_CPU} --tensorboard-dir {output / 'tensorboard'}".split()
    done = subprocess.run(
        [sys.executable, *torchrun, str(PROGRAM), *settings, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


def scalars(output: Path, name: str) -> list[float]:
    """A metric, step by step, from what Megatron-LM wrote for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars(name)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our trainer's run from a checkpoint of random weights: the data, the checkpoint, the metrics."""
    folder = tmp_path_factory.mktemp("ours")
    data = write_trajectories(folder / "data.jsonl", 60)
    train(folder / "start", data, 1, "train.max_steps=1")
    start = folder / "start" / "checkpoints"
    rows = train(folder / "run", data, 1, *OURS, f"checkpoint.pretrained={start}")
    return {"data": data, "start": start, "rows": rows}


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, "--tensor-model-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2"),
        (2, ""),
    ],
    ids=["TP 2", "PP 2", "DP 2"],
)
def test_losses_and_gradient_norms_are_those_of_our_trainer(
    processes: int, layout: str, ours: dict[str, Any], tmp_path: Path
) -> None:
    code, said = pretrain(
        processes, tmp_path, "--pear-data", str(ours["data"]), "--eval-iters", "0", *layout.split(),
        "--load", str(ours["start"]), "--finetune", "--no-load-optim", "--no-load-rng",
    )  # fmt: skip
    assert code == 0, "\n".join(re.findall(r"^.*(?:Error|error|File).*$", said, re.M)[:40])
    for theirs, key in (
        ("loss", "loss"),
        ("nll", "nll"),
        ("pear/weight", "pear/weight"),
        ("grad-norm", "grad_norm"),
    ):
        expected = [row[key] for row in ours["rows"]]
        assert scalars(tmp_path, theirs) == pytest.approx(expected, rel=1e-5), theirs
