"""Shifted log-probs are found; aligned ones, whatever the policy, are never accused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pear_megatron.alignment import ACCUSED, Alignment, alignment_sums, read_alignment


def compare(lp: Tensor, lb: Tensor, lengths: list[int], mask: Tensor | None = None) -> Alignment:
    mask = torch.ones(len(lp), dtype=torch.bool) if mask is None else mask
    return read_alignment(alignment_sums(lp, lb, mask, torch.tensor([0, *lengths]).cumsum(0)))


def text_like(tokens: int) -> Tensor:
    """Log-probs as of text: most tokens are nearly sure, some are not, in runs."""
    hard = torch.rand(tokens) < 0.4
    hard[1:] &= ~(hard[:-1] & (torch.rand(tokens - 1) < 0.3))
    return -torch.where(hard, torch.rand(tokens) * 6, torch.rand(tokens) * 0.2)


def move(x: Tensor, lengths: list[int], shift: int) -> Tensor:
    """Each segment's values ``shift`` later."""
    return torch.cat([segment.roll(shift) for segment in x.split(lengths)])


@pytest.mark.parametrize("shift", ACCUSED)
def test_a_shift_is_found_with_its_size_and_side(shift: int) -> None:
    lengths = [40] * 20
    truth = text_like(800)
    policy = truth + 0.8 * torch.randn(800) - 0.5  # another, weaker model
    found = compare(policy, move(truth, lengths, shift), lengths)
    assert found.shift == shift
    assert found.correlations[shift] > 0.7
    assert f"{abs(shift)} token" in found.refusal()
    assert ("after" if shift > 0 else "before") in found.refusal()
    assert "train.check_alignment=false" in found.refusal()


def test_aligned_log_probs_of_any_model_pass() -> None:
    lengths, truth = [40] * 20, text_like(800)
    for policy in (truth, 1.4 * truth, 0.6 * truth - 0.3, truth + 2 * torch.randn(800), text_like(800)):
        found = compare(policy, truth, lengths)
        assert found.shift == 0
        assert not found.describe()


def test_random_policies_on_repetitive_text_pass() -> None:
    """There every other shift correlates as well, of either sign: the hardest case for fresh weights."""
    lengths = [60] * 20
    phase = torch.arange(60).repeat(20) % 2
    truth = -torch.where(phase == 1, 3 + torch.rand(1200), 0.3 * torch.rand(1200))
    for seed in range(40):
        torch.manual_seed(seed)
        opinion = torch.randn(2)[phase] + 0.3 * torch.randn(1200)
        for policy in (opinion, move(opinion, lengths, 1)):
            assert compare(policy, truth, lengths).shift == 0


def test_a_few_decisions_are_no_evidence() -> None:
    truth = text_like(60)
    assert compare(truth, move(truth, [60], 1), [60]).shift == 0


def test_a_model_that_does_not_vary_says_nothing() -> None:
    truth = text_like(800)
    found = compare(torch.full((800,), -6.9), truth, [800])
    assert found.shift == 0
    assert found.correlations[0] == 0
    assert found.spread_ratio == 0


def test_only_decisions_count_and_neighbours_are_never_paired() -> None:
    """Prompts and padding between decisions change nothing, and nor does the next trajectory."""
    lengths, truth = [30] * 10, text_like(300)
    policy = truth + torch.randn(300)
    plain = alignment_sums(policy, truth, torch.ones(300, dtype=torch.bool), torch.arange(11) * 30)
    mask = torch.zeros(10, 35, dtype=torch.bool)
    mask[:, 3:33] = True
    scattered = [torch.full((10, 35), -50.0) for _ in range(2)]
    for target, values in zip(scattered, (policy, truth), strict=True):
        target[mask] = values
    padded = alignment_sums(*(t.flatten() for t in scattered), mask.flatten(), torch.arange(11) * 35)
    torch.testing.assert_close(padded, plain)
    assert plain[9, 0] == sum(lengths) - 10  # pairs at shift 1: one less a trajectory


def test_sums_add_up_over_batches() -> None:
    policy, truth = text_like(300), text_like(300)
    everything = torch.ones(300, dtype=torch.bool)
    whole = alignment_sums(policy, truth, everything, torch.tensor([0, 100, 180, 300]))
    parts = [
        alignment_sums(policy[a:b], truth[a:b], everything[a:b], torch.tensor([0, b - a]))
        for a, b in ((0, 100), (100, 180), (180, 300))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole)


def test_no_trajectories_are_aligned() -> None:
    empty = torch.zeros(0)
    assert compare(empty, empty, []).shift == 0


def test_another_temperature_shows_in_the_spread() -> None:
    truth = text_like(800)
    assert compare(truth, truth / 0.7, [800]).spread_ratio == pytest.approx(1 / 0.7)
