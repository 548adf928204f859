"""Megatron-LM's own loop (``megatron.training``, megatron-core 0.19) trains with PEAR as our trainer does."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.torchrun import torchrun
from tests.megatron.runs import launch, run_program, train, write_trajectories

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
    --lr 1e-3 --lr-decay-style constant --lr-decay-iters {STEPS} --weight-decay 0.1 --adam-beta1 0.9
    --adam-beta2 0.95 --adam-eps 1e-8
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


def settings(output: Path, *arguments: str) -> list[str]:
    """Options of a run that logs into ``output``."""
    return [*f"{MODEL} {TRAINING} {ON_CPU} --tensorboard-dir {output / 'tensorboard'}".split(), *arguments]


def pretrain(processes: int, output: Path, *arguments: str, program: Path = PROGRAM) -> tuple[int, str]:
    """Runs the example's program on some ranks -> its exit code and what it said."""
    target = partial(run_program, str(program))
    done = launch(processes, *settings(output, *arguments), check=False, config=None, target=target)
    return done.returncode, done.stderr


def finish(processes: int, output: Path, *arguments: str, program: Path = PROGRAM) -> str:
    """A run that ends well -> what it said."""
    code, said = pretrain(processes, output, *arguments, program=program)
    assert code == 0, "\n".join(re.findall(r"^.*(?:Error|error|File).*$", said, re.M)[:40])
    return said


def under_torchrun(processes: int, output: Path, *arguments: str) -> None:
    """The same, as a user starts it."""
    program, threads = "examples.megatron_lm.pretrain_pear", {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = torchrun(processes, program, settings(output, *arguments), folder=ROOT, **threads)
    assert done.returncode == 0, done.stdout[-6000:]


def from_weights(start: Path) -> list[str]:
    """Options that begin a run from a checkpoint's weights alone."""
    return ["--load", str(start), "--finetune", "--no-load-optim", "--no-load-rng"]


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
    held_out = write_trajectories(folder / "held-out.jsonl", 16, seed=1)
    rows = train(
        folder / "run", data, 1, *OURS, f"checkpoint.pretrained={start}", f"data.validation={held_out}",
        "train.eval_interval=5",
    )  # fmt: skip
    rows = [row for row in rows if row["step"]]
    return {"data": data, "held_out": held_out, "start": start, "rows": rows}


@pytest.mark.parametrize(
    ("run", "layout"),
    [
        (under_torchrun, "--tensor-model-parallel-size 2"),
        (finish, "--pipeline-model-parallel-size 2"),
        (finish, ""),
    ],
    ids=["TP 2", "PP 2", "DP 2"],
)
def test_losses_and_gradient_norms_are_those_of_our_trainer(
    run: Callable[..., object], layout: str, ours: dict[str, Any], tmp_path: Path
) -> None:
    run(
        2, tmp_path, "--pear-data", str(ours["data"]), "--eval-iters", "0", *layout.split(),
        *from_weights(ours["start"]),
    )  # fmt: skip
    compare(tmp_path, ours["rows"])


def compare(output: Path, rows: list[dict[str, Any]]) -> None:
    """Metrics of every step, theirs against our trainer's."""
    for theirs, key in (
        ("loss", "loss"),
        ("nll", "nll"),
        ("pear/weight", "pear/weight"),
        ("grad-norm", "grad_norm"),
    ):
        expected = [row[key] for row in rows]
        assert scalars(output, theirs) == pytest.approx(expected, rel=1e-5), theirs


@pytest.fixture(scope="module")
def interrupted(ours: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Five steps, saved, and the same command with --load for the other five, at TP 2 with evaluations."""
    folder = tmp_path_factory.mktemp("interrupted")
    save = folder / "checkpoints"
    common = [
        "--pear-data", str(ours["data"]), "--pear-validation-data", str(ours["held_out"]), "--eval-iters", "1",
        "--tensor-model-parallel-size", "2", "--save", str(save), "--save-interval", "5",
    ]  # fmt: skip
    first = finish(2, folder / "first", *common, "--train-iters", "5", *from_weights(ours["start"]))
    second = finish(2, folder / "second", *common, "--load", str(save), "--override-opt-param-scheduler")
    return {"folder": folder, "save": save, "said": first + second}


def test_a_resumed_run_goes_on_with_the_batches_that_it_would_have_had(
    interrupted: dict[str, Any], ours: dict[str, Any]
) -> None:
    compare(interrupted["folder"] / "first", ours["rows"][:5])
    compare(interrupted["folder"] / "second", ours["rows"][5:])


def test_evaluations_are_ratios_of_sums_as_our_trainers(
    interrupted: dict[str, Any], ours: dict[str, Any]
) -> None:
    for part, row in (("first", ours["rows"][4]), ("second", ours["rows"][9])):
        for key in ("loss", "nll", "pear/weight", "pear/effective_sample_size"):
            value = scalars(interrupted["folder"] / part, f"{key} validation")[0]
            assert value == pytest.approx(row[f"validation/{key}"], rel=1e-5), key


def test_weights_that_grow_are_said_once(interrupted: dict[str, Any]) -> None:
    assert "of one rank's micro-batches: the mean weight is" in interrupted["said"]


def test_its_checkpoint_is_exported(
    interrupted: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    from safetensors.torch import load_file

    from pear_megatron.megatron.checkpoint.export import export_checkpoint

    export_checkpoint(interrupted["save"], tmp_path / "theirs")
    export_checkpoint(ours["start"].parent.parent / "run", tmp_path / "ours")
    theirs, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (theirs[name] - tensor).abs().max() < 2e-4, name  # Adam makes steps of 1e-3 of rounding
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")]
    assert configs[0] == configs[1]


def test_without_reweighting_it_is_megatrons_own_loss(ours: dict[str, Any], tmp_path: Path) -> None:
    plain = ours["data"].parent / "plain.jsonl"
    rows = [json.loads(line) for line in ours["data"].read_text().splitlines()]
    plain.write_text("".join(json.dumps(row | {"reward": 1.0}) + "\n" for row in rows))
    arguments = ["--pear-data", str(plain), "--pear-variant", "none", "--eval-iters", "0",
                 "--pear-vocab-size", "1024",  # Megatron's own counts the padding of the vocabulary
                 *from_weights(ours["start"])]  # fmt: skip
    finish(1, tmp_path / "ours", *arguments)
    finish(1, tmp_path / "own", *arguments, program=Path(__file__).with_name("megatron_own_loss.py"))
    for name in ("loss", "grad-norm"):
        own = scalars(tmp_path / "own", name)
        assert len(own) == STEPS
        assert scalars(tmp_path / "ours", name) == pytest.approx(own, rel=1e-5), name


EXPERTS = Path(__file__).with_name("megatron_experts.py")
MIXTURE = """
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 128 --moe-router-dtype fp32
    --moe-token-dispatcher-type alltoall
"""


@pytest.fixture(scope="module")
def mixture(ours: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our trainer's run of a mixture of experts without the routers' losses, which it counts otherwise."""
    folder = tmp_path_factory.mktemp("mixture")
    experts = ["model.num_moe_experts=4", "model.moe_router_topk=2", "train.moe_aux_loss_coeff=0"]
    train(folder / "start", ours["data"], 1, "train.max_steps=1", *experts)
    start = folder / "start" / "checkpoints"
    rows = train(folder / "run", ours["data"], 1, *OURS, *experts, f"checkpoint.pretrained={start}")
    return {"start": start, "rows": rows}


def test_experts_on_two_ranks_train_as_in_our_trainer(
    mixture: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    finish(
        2, tmp_path, "--pear-data", str(ours["data"]), "--eval-iters", "0", *MIXTURE.split(),
        "--moe-router-load-balancing-type", "none", "--expert-model-parallel-size", "2",
        *from_weights(mixture["start"]), program=EXPERTS,
    )  # fmt: skip
    compare(tmp_path, mixture["rows"])


def test_the_routers_loss_survives_and_is_reported(
    mixture: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    finish(
        1, tmp_path, "--pear-data", str(ours["data"]), "--eval-iters", "0", *MIXTURE.split(),
        "--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "100",
        *from_weights(mixture["start"]), program=EXPERTS,
    )  # fmt: skip
    rows = mixture["rows"]
    assert scalars(tmp_path, "loss")[0] == pytest.approx(rows[0]["loss"], rel=1e-5)
    assert scalars(tmp_path, "grad-norm")[0] != pytest.approx(rows[0]["grad_norm"], rel=1e-3)
    losses = scalars(tmp_path, "load_balancing_loss")
    assert len(losses) == STEPS
    assert all(loss > 0.9 for loss in losses)


def test_the_schedule_that_overlaps_experts_communication_trains_alike(
    ours: dict[str, Any], tmp_path: Path
) -> None:
    """It asks the forward step for ``return_schedule_plan``."""
    experts = [
        "--pear-data", str(ours["data"]), "--eval-iters", "0", "--train-iters", "3", *MIXTURE.split(),
        "--expert-model-parallel-size", "2", "--bf16",
    ]  # fmt: skip
    finish(2, tmp_path / "plain", *experts)
    finish(2, tmp_path / "overlap", *experts, "--overlap-moe-expert-parallel-comm")
    for name in ("loss", "pear/weight", "grad-norm"):
        plain = scalars(tmp_path / "plain", name)
        assert len(plain) == 3
        assert scalars(tmp_path / "overlap", name) == pytest.approx(plain, rel=1e-3), name


def test_the_loss_of_multi_token_prediction_survives(ours: dict[str, Any], tmp_path: Path) -> None:
    arguments = [
        "--pear-data", str(ours["data"]), "--eval-iters", "0", "--train-iters", "3", "--mtp-num-layers", "1",
    ]  # fmt: skip
    finish(1, tmp_path / "large", *arguments, "--mtp-loss-scaling-factor", "100")
    finish(1, tmp_path / "none", *arguments, "--mtp-loss-scaling-factor", "0")
    large, none = (
        {key: scalars(tmp_path / run, key) for key in ("loss", "grad-norm", "mtp_1 loss")}
        for run in ("large", "none")
    )
    assert large["loss"][0] == pytest.approx(none["loss"][0], rel=1e-6)
    assert large["mtp_1 loss"][0] == pytest.approx(none["mtp_1 loss"][0], rel=1e-6)
    assert 6 < large["mtp_1 loss"][0] < 8  # log(1000), about
    assert large["grad-norm"][0] > 2 * none["grad-norm"][0]


def test_weights_of_another_model_than_the_options_are_refused(ours: dict[str, Any], tmp_path: Path) -> None:
    code, said = pretrain(
        1, tmp_path, "--pear-data", str(ours["data"]), "--eval-iters", "0", *from_weights(ours["start"]),
        "--rotary-base", "500000",
    )  # fmt: skip
    assert code != 0
    assert "describes another model than this run's options" in said
    assert "model.rotary_base 500000 (there 10000)" in said


def test_a_checkpoint_of_another_loss_is_not_gone_on_with(
    interrupted: dict[str, Any], ours: dict[str, Any]
) -> None:
    code, said = pretrain(
        1, interrupted["folder"] / "other", "--pear-data", str(ours["data"]), "--eval-iters", "0",
        "--load", str(interrupted["save"]), "--use-checkpoint-args", "--override-opt-param-scheduler",
        "--train-iters", "12", "--pear-gamma", "0.9",
    )  # fmt: skip
    assert code != 0
    assert "iter_0000010 was trained with --pear-gamma 0.999, and this run has 0.9" in said
