"""Loops of others refuse log-probs that belong to other tokens, in their first micro-batches."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from pear_megatron import PearConfig
from pear_megatron.adapters.verl.loss import PearSFTLoss
from pear_megatron.alignment_watch import VARIABLE, AlignmentWatch
from pear_megatron.data import DataError
from pear_megatron.data.batches import PackedBatch
from pear_megatron.megatron.forward_step import PearForwardStep
from pear_megatron.ops.statistics import TokenStatistics
from tests.test_alignment import move, text_like

LENGTHS = [40] * 20
CU = torch.arange(21) * 40
MASK = torch.ones(800, dtype=torch.bool)
TOKEN = PearConfig(variant="token")


def policies(shift: int) -> tuple[Tensor, Tensor]:
    """Log-probs of a model, and of the behaviour policy, moved by ``shift``; [800] each."""
    truth = text_like(800)
    return (truth + 0.5 * torch.randn(800)).clamp(max=0).requires_grad_(), move(truth, LENGTHS, shift)


def test_a_shift_is_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match=f"1 token after the ones they belong to.*{VARIABLE}=0"):
        AlignmentWatch(TOKEN)(*policies(1), MASK, CU)


def test_little_is_looked_at_again_with_more() -> None:
    watch, (model, data) = AlignmentWatch(TOKEN), policies(1)
    micro_batches = [(model[s : s + 80], data[s : s + 80], MASK[:80], CU[:3]) for s in range(0, 800, 80)]
    watch(*micro_batches[0])  # 78 pairs
    for micro_batch in micro_batches[1:3]:
        watch(*micro_batch)
    with pytest.raises(DataError, match="1 token after"):
        watch(*micro_batches[3])


@pytest.mark.parametrize(
    "config", [PearConfig(variant="none"), PearConfig(variant="none", dft_power=1.0)], ids=["SFT", "DFT"]
)
def test_a_loss_that_reads_no_log_probs_is_not_stopped(config: PearConfig) -> None:
    AlignmentWatch(config)(*policies(1), MASK, CU)


def test_evaluations_and_who_knows_better_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, given = AlignmentWatch(TOKEN), policies(1)
    with torch.no_grad():
        watch(*given, MASK, CU)
    monkeypatch.setenv(VARIABLE, "0")
    AlignmentWatch(TOKEN)(*given, MASK, CU)


def test_the_reference_is_looked_at_where_ratios_are_taken_against_it() -> None:
    model, moved = policies(2)
    watch = AlignmentWatch(PearConfig(variant="sequence", ratio="reference"))
    with pytest.raises(DataError, match="reference_logprobs seem to stand 2 tokens after"):
        watch(model, None, MASK, CU, reference_logprobs=moved)


def test_unrelated_log_probs_are_said_once_and_then_nothing_is_looked_at(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "pear_megatron")
    watch = AlignmentWatch(TOKEN)
    for _ in range(64):
        watch(text_like(800).requires_grad_(), text_like(800), MASK, CU)
    assert ["have nothing to do with the log-probs of the model" in r.message for r in caplog.records] == [
        True
    ]
    watch(*policies(1), MASK, CU)


def test_verls_loss_refuses_a_shift() -> None:
    def jagged(flat: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(flat, CU)

    model, moved = policies(1)  # aligned with tokens; verl's log-probs stand a token earlier
    mask = MASK.clone()
    mask[CU[:-1]] = False
    data: dict[str, Any] = {
        "loss_mask": jagged(mask.long()),
        "behavior_logprobs": jagged(moved),
        "reward": jagged(torch.ones(800)),
        "dp_size": 1,
        "batch_num_tokens": 780,
    }
    with pytest.raises(DataError, match="1 token after"):
        PearSFTLoss(TOKEN)({"log_probs": jagged(model.roll(-1))}, data)


def test_the_forward_step_of_megatrons_loops_refuses_a_shift() -> None:
    model, moved = policies(1)
    batch = PackedBatch(
        tokens=torch.zeros(1, 800, dtype=torch.long),
        labels=torch.zeros(1, 800, dtype=torch.long),
        loss_mask=MASK[None],
        behavior_logprobs=moved[None],
        position_ids=torch.arange(40).repeat(20)[None],
        padding_mask=~MASK[None],
        cu_seqlens=CU.int(),
        reward=torch.ones(20),
        trajectory_index=torch.arange(20),
        max_seqlen=40,
    )
    step = PearForwardStep(TOKEN, vocab_size=8, check_alignment=True)
    with pytest.raises(DataError, match="1 token after"):
        step.loss_of_statistics(TokenStatistics(model), batch)
    unwatched = PearForwardStep(TOKEN, vocab_size=8)  # our trainer's, which looks before its first step
    loss, count, _ = unwatched.loss_of_statistics(TokenStatistics(model), batch)
    assert torch.isfinite(loss)
    assert count == 800
