"""Batches shared by context-parallel ranks: the loss, its gradient and a run are those of one rank.

Attention over the shards needs Transformer Engine and a GPU. Everything else is tested here: the rows, the
loss from logits to their gradient, and whole runs of a model whose layers have no attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pear_megatron import PearConfig
from pear_megatron.data import BatchPlan, PackedBatch, Trajectory, collate, micro_batches
from tests.distributed import run_ranks, zigzag
from tests.megatron.ranks import SMALL, rank_train
from tests.megatron.runs import metrics
from tests.megatron.test_layouts import DISTRIBUTED, TP, assert_same_run
from tests.megatron.test_resume import interrupted_copy

VOCABULARY = 256
SEQ_LENGTH = 96
VARIANTS = {
    "none": PearConfig(variant="none"),
    "token": PearConfig(variant="token"),
    "token-normalized": PearConfig(variant="token", normalize="sequence", negative_scale=0.5),
    "block": PearConfig(variant="block", block_size=3, baseline="sequence_mean"),
    "sequence": PearConfig(variant="sequence", baseline="sequence_mean"),
}


def make_trajectories(count: int = 9) -> list[Trajectory]:
    rng = np.random.default_rng(0)
    trajectories = []
    for i in range(count):
        n = int(rng.integers(4, 40))
        mask = rng.random(n) < 0.8
        mask[0], mask[-1] = False, True
        trajectories.append(
            Trajectory(
                id=str(i),
                input_ids=rng.integers(0, VOCABULARY, n).astype(np.int32),
                loss_mask=mask,
                behavior_logprobs=np.where(mask, -5.4 - 0.3 * rng.random(n), 0).astype(np.float32),
                reward=float(rng.choice([1.0, 1.0, -1.0])),
            )
        )
    return trajectories


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_shard_is_the_zigzag_of_every_segment_and_field(ranks: int) -> None:
    whole = collate(make_trajectories(), [[0, 1], [2, 3], []], SEQ_LENGTH, multiple=2 * ranks)
    assert bool((whole.cu_seqlens.diff() % (2 * ranks) == 0).all())
    for rank in range(ranks):
        shard = whole.shard(rank, ranks)
        assert shard.tokens.shape == (3, SEQ_LENGTH // ranks)
        for name in ("tokens", "labels", "loss_mask", "behavior_logprobs", "position_ids"):
            expected = zigzag(getattr(whole, name).flatten(), whole.cu_seqlens, rank, ranks)
            assert torch.equal(getattr(shard, name).flatten(), expected), name
        for name in ("cu_seqlens", "reward", "trajectory_index"):
            assert torch.equal(getattr(shard, name), getattr(whole, name)), name
        assert shard.max_seqlen == whole.max_seqlen


def test_padding_to_a_multiple_keeps_every_decision_where_it_was() -> None:
    trajectories = make_trajectories()
    padded = collate(trajectories, [[0, 1, 2]], SEQ_LENGTH, multiple=8)
    starts = padded.cu_seqlens.tolist()
    for k, trajectory in enumerate(trajectories[:3]):
        n = len(trajectory.input_ids) - 1
        here, padding = slice(starts[k], starts[k] + n), slice(starts[k] + n, starts[k + 1])
        assert padded.tokens[0, here].tolist() == trajectory.input_ids[:-1].tolist()
        assert padded.loss_mask[0, here].tolist() == trajectory.loss_mask[1:].tolist()
        assert padded.position_ids[0, starts[k] : starts[k + 1]].tolist() == list(
            range(starts[k + 1] - starts[k])
        )
        assert not padded.loss_mask[0, padding].any()
        assert (padded.labels[0, padding] == -100).all()


def test_a_batch_that_was_not_padded_for_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"segment 0 has \d+ tokens, not divisible by 4"):
        collate(make_trajectories(), [[0, 1]], SEQ_LENGTH).shard(0, 2)


def test_rows_are_planned_with_the_padding_and_shared_over_both_kinds_of_ranks() -> None:
    trajectories = make_trajectories(40)
    plan = BatchPlan([len(t.input_ids) for t in trajectories], SEQ_LENGTH, 8, seed=3, multiple=4)
    seen: list[int] = []
    decisions = 0
    for step in range(plan.steps_per_epoch()):
        for dp_rank in range(2):
            for batch in micro_batches(
                trajectories, plan, step, dp_rank=dp_rank, dp_size=2, micro_batch_size=2, cp_rank=1, cp_size=2
            ):
                assert batch.tokens.shape == (2, SEQ_LENGTH // 2)
                seen += [i for i in batch.trajectory_index.tolist() if i >= 0]
        for cp_rank in range(2):
            decisions += sum(
                int(batch.loss_mask.sum())
                for batch in micro_batches(
                    trajectories, plan, step, dp_rank=0, dp_size=1, micro_batch_size=2, cp_rank=cp_rank, cp_size=2
                )
            )  # fmt: skip
    assert sorted(seen) == list(range(40))
    assert decisions == sum(int(t.loss_mask[1:].sum()) for t in trajectories)


def rank_losses(rank: int, batch: PackedBatch, logits: torch.Tensor, cp_size: int) -> list[Any]:
    """Every variant's loss tuple and gradient on this rank; ranks beside the context's share the vocabulary."""
    from pear_megatron.megatron.forward_step import PearForwardStep

    ranks = torch.distributed.get_world_size()
    tp_size = ranks // cp_size
    cp_groups = [
        torch.distributed.new_group([t + tp_size * c for c in range(cp_size)]) for t in range(tp_size)
    ]
    tp_groups = [
        torch.distributed.new_group([t + tp_size * c for t in range(tp_size)]) for c in range(cp_size)
    ]
    tp_rank, cp_rank = rank % tp_size, rank // tp_size
    mine = zigzag(logits, batch.cu_seqlens, cp_rank, cp_size) if cp_size > 1 else logits
    mine = mine.chunk(tp_size, dim=-1)[tp_rank]
    results = []
    for config in VARIANTS.values():
        step = PearForwardStep(
            config,
            vocab_size=VOCABULARY,
            tp_group=tp_groups[cp_rank] if tp_size > 1 else None,
            cp_group=cp_groups[tp_rank] if cp_size > 1 else None,
        )
        shard = mine.clone()[None].requires_grad_()
        loss, tokens, report = step.loss(shard * 1, batch.shard(cp_rank, cp_size))
        loss.backward()
        results.append((loss.detach(), tokens, report, shard.grad[0]))
    return results


@pytest.mark.parametrize(("ranks", "cp_size"), [(2, 2), (4, 4), (4, 2)], ids=["CP2", "CP4", "TP2xCP2"])
def test_loss_statistics_and_gradient_are_those_of_one_rank(ranks: int, cp_size: int) -> None:
    batch = collate(make_trajectories(), [[0, 1], [2, 3], []], SEQ_LENGTH, multiple=2 * cp_size)
    logits = 2 * torch.randn(batch.tokens.numel(), VOCABULARY, generator=torch.Generator().manual_seed(5))
    (whole,) = run_ranks(1, rank_losses, batch, logits, 1)
    shards = run_ranks(ranks, rank_losses, batch, logits, cp_size)
    tp_size = ranks // cp_size
    for k, name in enumerate(VARIANTS):
        loss, tokens, report, gradient = whole[k]
        firsts = [shards[tp_size * c][k] for c in range(cp_size)]  # one rank of each tensor-parallel group
        torch.testing.assert_close(sum(f[0] for f in firsts), loss, rtol=1e-5, atol=1e-4, msg=name)
        assert sum(int(f[1]) for f in firsts) == int(tokens)
        for key in report:
            torch.testing.assert_close(
                sum(f[2][key] for f in firsts), report[key], rtol=1e-5, atol=1e-4, msg=f"{name} {key}"
            )
        for rank in range(ranks):
            expected = zigzag(gradient, batch.cu_seqlens, rank // tp_size, cp_size).chunk(tp_size, dim=-1)
            torch.testing.assert_close(
                shards[rank][k][3], expected[rank % tp_size], rtol=1e-5, atol=1e-7, msg=f"{name} rank {rank}"
            )


CP = "parallel.context_parallel_size=2"


def rank_train_without_attention(rank: int, runs: list[list[str]]) -> list[bool | str]:
    """rank_train, of models that see each token and its position alone: what shards can do without attention."""
    from pear_megatron.megatron import cpu

    cpu.enable()
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    from pear_megatron.megatron import attention, layout

    with_attention = gpt_layer_specs.get_gpt_layer_local_spec

    def without_attention(**options: Any) -> Any:
        spec = with_attention(**options)
        spec.submodules.input_layernorm = spec.submodules.self_attention = IdentityOp
        spec.submodules.self_attn_bda = IdentityFuncOp
        return spec

    gpt_layer_specs.get_gpt_layer_local_spec = without_attention
    attention.with_varlen_attention = lambda spec: spec
    layout.check_attention = lambda parallel, train: None
    return rank_train(rank, runs)


def train_without_attention(world: int, data: Path, runs: dict[Path, list[str]]) -> list[bool | str]:
    """Outcomes on the first rank."""
    model = [*SMALL, "model.position_embedding_type=learned_absolute"]
    overrides = [
        [f"data.train={data}", f"output_dir={folder}", *model, *extra] for folder, extra in runs.items()
    ]
    outcomes = run_ranks(world, rank_train_without_attention, overrides)
    assert all(other == outcomes[0] for other in outcomes)
    return outcomes[0]


def test_runs_with_context_parallel_ranks_train_like_one_process(tmp_path: Path, trajectories: Path) -> None:
    """Without packing: padding to a multiple would put other trajectories together."""
    unpacked = ["data.packing=false"]
    assert train_without_attention(1, trajectories, {tmp_path / "one": unpacked}) == [True]
    runs = {
        tmp_path / "CP4": [*unpacked, "parallel.context_parallel_size=4"],
        tmp_path / "CP2xDP2": [*unpacked, CP, DISTRIBUTED],
        tmp_path / "TP2xCP2": [*unpacked, CP, TP],
        tmp_path / "PP2xCP2": [*unpacked, CP, "parallel.pipeline_model_parallel_size=2"],
    }
    assert train_without_attention(4, trajectories, runs) == [True] * len(runs)
    for folder in runs:
        assert_same_run(metrics(folder), metrics(tmp_path / "one"), relative=1e-5)


def test_a_run_keeps_its_rows_when_it_goes_on_with_fewer_context_parallel_ranks(
    tmp_path: Path, trajectories: Path
) -> None:
    straight, saving = tmp_path / "straight", "checkpoint.save_interval=2"
    assert train_without_attention(2, trajectories, {straight: [CP, saving]}) == [True]
    resumed = interrupted_copy(straight, tmp_path / "resumed", 2)
    assert train_without_attention(1, trajectories, {resumed: []}) == [True]
    assert_same_run(metrics(resumed), metrics(straight), relative=1e-5)

    wider = interrupted_copy(straight, tmp_path / "wider", 2)
    (error,) = train_without_attention(4, trajectories, {wider: ["parallel.context_parallel_size=4"]})
    assert "its rows pad trajectories to multiples of 4" in str(error)
    assert "parallel.context_parallel_size 4 needs 8" in str(error)
