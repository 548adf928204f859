"""A mixture of experts trains on every layout as on one process, and its routers' losses count each token once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.megatron.ranks import SMALL, be_quiet, failures, final_weights, train_runs
from tests.megatron.runs import TINY, metrics, without_times
from tests.megatron.test_layouts import assert_same_run, assert_same_weights

TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
EP = "parallel.expert_model_parallel_size=2"
WHOLE_EXPERTS = "parallel.expert_tensor_parallel_size=1"
DISTRIBUTED = "parallel.use_distributed_optimizer=true"
OVERLAP = [DISTRIBUTED, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
MIXTURE = [
    "model.num_moe_experts=4",
    "model.moe_router_topk=2",
    "model.moe_ffn_hidden_size=24",
    "model.qk_layernorm=true",
    "train.moe_aux_loss_coeff=0.05",
    "train.moe_z_loss_coeff=0.01",
]
TWO_RANKS = {
    "EP2": [EP],
    "EP2-distributed": [EP, *OVERLAP],
    "DP2": [],
    "TP2": [TP, SP],
    "TP2xEP2-whole-experts": [TP, SP, EP, WHOLE_EXPERTS],
    "PP2": [PP],
}
FOUR_RANKS = {
    "EP2xDP2": [EP],
    "EP4": ["parallel.expert_model_parallel_size=4"],
    "PP2xEP2": [PP, EP],
    "PP2xVPP2xEP2": [PP, EP, "parallel.virtual_pipeline_model_parallel_size=2"],
    "TP2xEP2": [TP, SP, EP],
    "TP2xEP2xDP2-whole-experts": [TP, SP, EP, WHOLE_EXPERTS, *OVERLAP],
    "TP2xPP2xEP2": [TP, SP, PP, EP, WHOLE_EXPERTS],
}


@pytest.fixture(scope="module")
def one_process(
    tmp_path_factory: pytest.TempPathFactory, trajectories: Path
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("mixture") / "one"
    (rows,) = train_runs(1, trajectories, {folder: MIXTURE}).values()
    return folder, rows


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layouts"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two", "four"])
def test_every_layout_trains_like_one_process(
    tmp_path: Path,
    trajectories: Path,
    one_process: tuple[Path, list[dict[str, Any]]],
    ranks: int,
    layouts: dict[str, list[str]],
) -> None:
    """Losses, the routers' losses, every statistic, gradient norms, and at the end the weights."""
    runs = train_runs(
        ranks, trajectories, {tmp_path / name: [*MIXTURE, *extra] for name, extra in layouts.items()}
    )
    reference, *others = final_weights(one_process[0], *runs)
    for folder, weights in zip(runs, others, strict=True):
        assert_same_run(runs[folder], one_process[1], relative=1e-5)
        assert_same_weights(folder.name, weights, reference)


def rank_router_gradients(rank: int, folder: Path, data: Path, overrides: list[str]) -> dict[str, Any]:
    """One step's gradient of every router, what the routers routed, and the step's metrics."""
    from pear_megatron.megatron import cpu, moe
    from pear_megatron.megatron.layout import initialize
    from pear_megatron.recipe import load_recipe
    from pear_megatron.train.trainer import Trainer

    cpu.enable()
    be_quiet()
    recipe = load_recipe(TINY, [f"data.train={data}", f"output_dir={folder}", *SMALL, *overrides])
    trainer = Trainer(recipe, initialize(recipe.model, recipe.parallel, recipe.train))
    weights = [router.weight.detach().clone() for router in moe.routers(trainer.model)]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    moe.routers(trainer.model)[-1].register_forward_hook(
        lambda _, args, __: seen.append((args[0].detach().clone(), args[1].clone()))
    )
    for chunk in trainer.model:
        chunk.train()
    seen.clear()
    row, _ = trainer._train_step()
    routers = moe.routers(trainer.model)
    return {
        "metrics": row,
        "weights": weights,
        "seen": seen,
        "gradients": [router.weight.main_grad.clone() for router in routers],
        "routed": list(moe.routed_tokens(trainer.model)),
    }


MOSTLY_PADDING = [
    "data.packing=false",
    "optimizer.clip_grad=0",
]  # rows of 128 positions, trajectories of 8 to 60


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, trajectories: Path) -> dict[str, dict[str, Any]]:
    """A first step without the routers' losses, and with each of them."""
    root = tmp_path_factory.mktemp("steps")
    without = [key for key in MIXTURE if "coeff" not in key] + MOSTLY_PADDING
    runs = {
        "none": without,
        "aux": [*without, "train.moe_aux_loss_coeff=0.5"],
        "z": [*without, "train.moe_z_loss_coeff=0.5"],
    }
    return {
        name: run_ranks(1, rank_router_gradients, root / name, trajectories, keys)[0]
        for name, keys in runs.items()
    }


def test_padding_is_never_routed(steps: dict[str, dict[str, Any]]) -> None:
    tokens = steps["none"]["metrics"]["tokens"]
    assert tokens < 8 * 128 / 2  # of a step's eight rows most is padding
    assert steps["none"]["routed"] == [tokens] * 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_padding_is_never_routed_on_any_layout(tmp_path: Path, trajectories: Path, ranks: int) -> None:
    layout = [EP] if ranks == 2 else [TP, SP, PP, EP, WHOLE_EXPERTS]
    found = run_ranks(
        ranks, rank_router_gradients, tmp_path, trajectories, [*MIXTURE, *MOSTLY_PADDING, *layout]
    )
    layers = 4 if ranks == 2 else 2
    for i in range(layers):  # ranks of a stage share its tokens
        stages = [found] if ranks == 2 else [found[:2], found[2:]]
        for stage in stages:
            assert sum(rank["routed"][i] for rank in stage) == stage[0]["metrics"]["tokens"]


@pytest.mark.parametrize(("run", "metric"), [("aux", "moe/aux_loss"), ("z", "moe/z_loss")])
def test_a_routers_loss_is_a_mean_over_the_steps_tokens_and_apart_from_the_loss(
    steps: dict[str, dict[str, Any]], run: str, metric: str
) -> None:
    """Of the last layer: the routers' losses do not change what its router sees."""
    plain, with_loss = steps["none"], steps[run]
    assert with_loss["metrics"]["loss"] == plain["metrics"]["loss"]
    assert metric in with_loss["metrics"]
    assert not any(key.startswith("moe/") for key in plain["metrics"])
    assert plain["metrics"]["decisions"] < plain["metrics"]["tokens"]
    difference = with_loss["gradients"][-1] - plain["gradients"][-1]
    expected = defined_gradient(metric, plain["weights"][-1], plain["seen"])
    torch.testing.assert_close(difference, 0.5 * expected, rtol=1e-4, atol=1e-6)


def defined_gradient(
    metric: str, weight: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Gradient of the definition in docs/moe.md, from what a router saw of each micro-batch: inputs, and padding."""
    weight = weight.clone().requires_grad_()
    total, tokens = torch.tensor(0.0), 0
    for hidden, padding in seen:
        logits = hidden[~padding] @ weight.T  # [tokens, experts]
        tokens += len(logits)
        if metric == "moe/z_loss":
            total = total + logits.logsumexp(-1).square().sum()
        elif len(logits):
            share = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 0.5).mean(0)
            total = total + len(logits) * 4 * (share * logits.softmax(-1).mean(0)).sum()
    (total / tokens).backward()
    assert weight.grad is not None
    return weight.grad


def test_an_interrupted_run_goes_on_bit_for_bit_and_on_other_expert_ranks(
    tmp_path: Path, trajectories: Path, one_process: tuple[Path, list[dict[str, Any]]]
) -> None:
    whole, same, other = tmp_path / "whole", tmp_path / "same", tmp_path / "other"
    half = "train.max_steps=2"
    keys = [*MIXTURE, DISTRIBUTED, "optimizer.lr_decay_steps=4", EP]
    train_runs(2, trajectories, {whole: keys, same: [*keys, half], other: [*keys, half]})
    resumed = train_runs(2, trajectories, {same: keys})[same]
    assert without_times(resumed) == without_times(metrics(whole))
    on_four = train_runs(4, trajectories, {other: [*keys, "parallel.expert_model_parallel_size=4"]})[other]
    assert_same_run(on_four, metrics(whole), relative=1e-5)
    weights = final_weights(whole, same, other)
    assert all(torch.equal(weights[1][name], weights[0][name]) for name in weights[0])
    assert_same_weights("other", weights[2], weights[0])


def test_recomputed_activations_change_no_bit(
    tmp_path: Path, trajectories: Path, one_process: tuple[Path, list[dict[str, Any]]]
) -> None:
    recompute = ["granularity=full", "method=uniform", "num_layers=1"]
    run = {tmp_path / "run": [*MIXTURE, *(f"train.recompute_{key}" for key in recompute)]}
    (rows,) = train_runs(1, trajectories, run).values()
    assert without_times(rows) == without_times(one_process[1])


def test_bf16_follows_float32(
    tmp_path: Path, trajectories: Path, one_process: tuple[Path, list[dict[str, Any]]]
) -> None:
    run = {tmp_path / "run": [*MIXTURE, EP, *OVERLAP, "train.precision=bf16"]}
    (rows,) = train_runs(2, trajectories, run).values()
    for row, expected in zip(rows, one_process[1], strict=True):
        for key in ("nll", "moe/aux_loss", "moe/z_loss"):
            assert row[key] == pytest.approx(expected[key], rel=3e-2)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.num_moe_experts=4"], "num_moe_experts needs moe_router_topk"),
        (["model.moe_router_topk=2"], "moe_router_topk 2 needs num_moe_experts"),
        ([*MIXTURE, TP], "needs parallel.sequence_parallel"),
        ([*MIXTURE, TP, SP, WHOLE_EXPERTS], "needs parallel.expert_model_parallel_size of 2 or more"),
        ([*MIXTURE, "parallel.expert_model_parallel_size=3"], "is not divisible by"),
        ([EP], "parallel.expert_model_parallel_size 2 splits experts, and model.num_moe_experts is not set"),
        (["train.moe_z_loss_coeff=0.1"], "train.moe_z_loss_coeff is of routers"),
        ([*MIXTURE, "model.moe_router_topk=5"], "moe_router_topk 5 exceeds num_moe_experts 4"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_keys(
    tmp_path: Path, trajectories: Path, keys: list[str], said: str
) -> None:
    for message in failures(2, trajectories, tmp_path / "run", *keys):
        assert said in message
