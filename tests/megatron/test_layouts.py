"""The same run on every layout gives the one-process answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron.ranks import failures, final_weights, train_runs
from tests.megatron.runs import TIMES, train, without_times, write_trajectories

TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
VPP = "parallel.virtual_pipeline_model_parallel_size=2"
DISTRIBUTED = "parallel.use_distributed_optimizer=true"
OVERLAP = [DISTRIBUTED, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
TIED = "model.share_embeddings_and_output_weights=true"

FOUR_RANKS = {
    "TP2xPP2": [TP, PP],
    "TP2xDP2": [TP],
    "TP2xPP2-sequence-parallel": [TP, PP, "parallel.sequence_parallel=true"],
    "PP2xDP2": [PP],
    "PP2xVPP2xDP2": [PP, VPP],
    "TP2xPP2xVPP2": [TP, PP, VPP],
    "TP4": ["parallel.tensor_model_parallel_size=4", "model.num_query_groups=4"],
    "DP4-distributed-optimizer": [DISTRIBUTED],
    "TP2xDP2-overlapped": [TP, *OVERLAP],
    "PP2xVPP2xDP2-overlapped": [PP, VPP, *OVERLAP],
}


def assert_same_run(run: list[dict[str, Any]], reference: list[dict[str, Any]], relative: float) -> None:
    assert [row["step"] for row in run] == [row["step"] for row in reference]
    for row, expected in zip(run, reference, strict=True):
        assert row.keys() == expected.keys()
        for key in expected.keys() - TIMES:
            value = expected[key]
            if not isinstance(value, str):
                value = pytest.approx(value, rel=relative, abs=1e-7)
            assert row[key] == value, (row["step"], key)


def assert_same_weights(
    run: str, weights: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> None:
    assert weights.keys() == reference.keys()
    for name, expected in reference.items():
        torch.testing.assert_close(
            weights[name], expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{run} {name}: {text}"
        )


@pytest.fixture(scope="module")
def one_process(
    tmp_path_factory: pytest.TempPathFactory, trajectories: Path
) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """What the layouts are compared with: the same model on one process, and its variations."""
    root = tmp_path_factory.mktemp("one_process")
    runs = {root / "plain": [], root / "four-groups": ["model.num_query_groups=4"], root / "tied": [TIED]}
    return {folder.name: (folder, rows) for folder, rows in train_runs(1, trajectories, runs).items()}


@pytest.mark.slow
def test_every_layout_of_four_ranks_trains_like_one_process(
    tmp_path: Path, trajectories: Path, one_process: dict[str, tuple[Path, list[dict[str, Any]]]]
) -> None:
    """Losses, every statistic, gradient norms, and at the end the weights."""
    runs = train_runs(4, trajectories, {tmp_path / name: extra for name, extra in FOUR_RANKS.items()})
    names = ["four-groups" if folder.name == "TP4" else "plain" for folder in runs]
    references = final_weights(one_process["plain"][0], one_process["four-groups"][0])
    by_name = dict(zip(("plain", "four-groups"), references, strict=True))
    for folder, name, weights in zip(runs, names, final_weights(*runs), strict=True):
        assert_same_run(runs[folder], one_process[name][1], relative=1e-5)
        assert_same_weights(folder.name, weights, by_name[name])


def test_tied_embeddings_train_alike_on_every_pipeline(
    tmp_path: Path, trajectories: Path, one_process: dict[str, tuple[Path, list[dict[str, Any]]]]
) -> None:
    runs = train_runs(2, trajectories, {tmp_path / "PP2": [TIED, PP], tmp_path / "PP2xVPP2": [TIED, PP, VPP]})
    for rows in runs.values():
        assert_same_run(rows, one_process["tied"][1], relative=1e-5)


def test_micro_batch_size_changes_nothing(
    tmp_path: Path, trajectories: Path, one_process: dict[str, tuple[Path, list[dict[str, Any]]]]
) -> None:
    runs = train_runs(
        1,
        trajectories,
        {tmp_path / "8": ["train.micro_batch_size=8"], tmp_path / "1": ["train.micro_batch_size=1"]},
    )
    for rows in runs.values():
        assert_same_run(rows, one_process["plain"][1], relative=1e-5)


RECOMPUTE = {
    "uniform": ["full", "uniform", "1"],
    "uniform-by-two": ["full", "uniform", "2"],
    "block": ["full", "block", "1"],
    "selective": ["selective", "null", "null"],
    "modules": ["selective", "null", "null", "[core_attn,mlp]"],
}


def test_recomputed_activations_change_no_bit(
    tmp_path: Path, trajectories: Path, one_process: dict[str, tuple[Path, list[dict[str, Any]]]]
) -> None:
    keys = ("granularity", "method", "num_layers", "modules")
    runs = train_runs(
        1,
        trajectories,
        {
            tmp_path / name: [f"train.recompute_{k}={v}" for k, v in zip(keys, values, strict=False)]
            for name, values in RECOMPUTE.items()
        },
    )
    for rows in runs.values():
        assert without_times(rows) == without_times(one_process["plain"][1])
    reference, *others = final_weights(one_process["plain"][0], *runs)
    for weights in others:
        assert all(torch.equal(weights[name], reference[name]) for name in reference)


def test_the_command_trains_a_layout_of_four_ranks(
    tmp_path: Path, trajectories: Path, one_rank: list[dict[str, Any]]
) -> None:
    assert_same_run(train(tmp_path / "run", trajectories, 4, TP, PP), one_rank, relative=1e-5)


def test_bf16_with_tied_embeddings_follows_float32_on_every_layout(
    tmp_path: Path, trajectories: Path
) -> None:
    tied = [TIED, "model.add_qkv_bias=true"]
    (reference,) = train_runs(1, trajectories, {tmp_path / "fp32": tied}).values()
    (run,) = train_runs(2, trajectories, {tmp_path / "bf16": [*tied, PP, "train.precision=bf16"]}).values()
    assert_same_run(
        [{k: row[k] for k in ("step", "loss", "nll", "grad_norm")} for row in run],
        [{k: row[k] for k in ("step", "loss", "nll", "grad_norm")} for row in reference],
        relative=2e-2,
    )


@pytest.mark.parametrize("layout", [[PP, VPP], [DISTRIBUTED]], ids=["PP2xVPP2", "DP2"])
def test_a_loss_that_is_not_finite_names_rank_step_and_trajectories_on_every_layout(
    tmp_path: Path, trajectories: Path, layout: list[str]
) -> None:
    explosive = ["optimizer.lr=1e30", "optimizer.clip_grad=0"]
    messages = failures(2, trajectories, tmp_path / "run", *layout, *explosive)
    assert messages[0] == messages[1]
    assert messages[0].startswith("TrainingError: ")
    assert " at step " in messages[0]
    assert "rank 1: trajectory-" in messages[0]


def test_a_gradient_that_is_not_finite_stops_the_run_though_its_loss_is(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl", count=8)
    rows = [json.loads(line) | {"reward": 1e30} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (message,) = failures(1, data, tmp_path / "run")
    assert "the gradient's norm is inf at step 1 and the loss is finite" in message
    assert "trajectory-" in message
    assert not (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


def test_context_parallelism_is_refused_on_cpu(tmp_path: Path, trajectories: Path) -> None:
    for message in failures(2, trajectories, tmp_path / "run", "parallel.context_parallel_size=2"):
        assert "parallel.context_parallel_size 2 needs a GPU, Transformer Engine" in message
        assert "train.precision=bf16" in message


def test_the_trajectories_of_a_step_are_the_seeds_and_not_the_losss_or_the_layouts(
    tmp_path: Path, trajectories: Path, one_process: dict[str, tuple[Path, list[dict[str, Any]]]]
) -> None:
    """metrics.jsonl's ``trajectories`` is how `pear-megatron compare` sees that arms took the same data."""

    def seen(rows: list[dict[str, Any]]) -> list[str]:
        return [row["trajectories"] for row in rows]

    reference = seen(one_process["plain"][1])
    assert len(set(reference)) == len(reference) == 4
    (same,) = train_runs(
        2, trajectories, {tmp_path / "tp": [TP, "pear.variant=none", "optimizer.lr=1e-2"]}
    ).values()
    assert seen(same) == reference
    (other,) = train_runs(1, trajectories, {tmp_path / "seed": ["seed=5"]}).values()
    assert not set(seen(other)) & set(reference)
