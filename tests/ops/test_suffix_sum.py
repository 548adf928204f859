"""segmented_suffix_sum: per trajectory, the sum of what comes after each token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pear_megatron import segmented_suffix_sum
from pear_megatron.ops import reference
from pear_megatron.ops.library import ops
from tests.distributed import run_ranks, zigzag


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def assert_equals_reference(x: Tensor, cu_seqlens: Tensor) -> None:
    for exclusive in (True, False):
        out = segmented_suffix_sum(x, cu_seqlens, exclusive=exclusive)
        assert out.dtype == torch.float32
        expected = reference.suffix_sum(x, cu_seqlens, exclusive)
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_case_by_hand():
    x = torch.tensor([1.0, 2.0, 4.0, 10.0, 20.0])
    cu = torch.tensor([0, 3, 3, 5])
    assert segmented_suffix_sum(x, cu).tolist() == [6.0, 4.0, 0.0, 20.0, 0.0]
    assert segmented_suffix_sum(x, cu, exclusive=False).tolist() == [7.0, 6.0, 4.0, 30.0, 20.0]


@pytest.mark.parametrize(
    "lengths", [[], [0], [0, 0, 3], [3, 0, 0], [1], [1, 1, 1], [2, 1, 7, 0, 4], [500, 0, 1, 300]]
)
def test_segments_of_any_length_equal_the_reference(lengths):
    assert_equals_reference(torch.randn(sum(lengths)), bounds(lengths))


@given(lengths=st.lists(st.integers(0, 9), max_size=12), data=st.data())
def test_any_pack_equals_the_reference(lengths, data):
    values = st.floats(-1e3, 1e3, width=32)
    x = torch.tensor(data.draw(st.lists(values, min_size=sum(lengths), max_size=sum(lengths))))
    assert_equals_reference(x.float(), bounds(lengths))


def test_a_long_segment_loses_nothing_to_rounding():
    x = torch.full((1_000_000,), 0.1)
    out = segmented_suffix_sum(x, torch.tensor([0, 1_000_000]), exclusive=False)
    expected = x.double().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-7, atol=0)


def test_nan_stays_within_its_segment():
    x = torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0])
    out = segmented_suffix_sum(x, torch.tensor([0, 3, 5]))
    assert out[0].isnan()
    assert out[1:].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_carry_is_added_to_every_sum_of_its_segment():
    x, carry = torch.randn(7), torch.tensor([10.0, 20.0, 30.0])
    cu = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    for exclusive in (True, False):
        out = ops.segmented_suffix_sum(x, cu, carry, exclusive)
        expected = reference.suffix_sum(x, cu, exclusive) + carry[[0, 0, 0, 0, 2, 2, 2]]
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_segment_sum_is_the_whole_of_each_segment():
    x = torch.randn(7)
    sums = ops.segment_sum(x, torch.tensor([0, 4, 4, 7], dtype=torch.int32))
    torch.testing.assert_close(sums, torch.stack([x[:4].sum(), torch.tensor(0.0), x[4:].sum()]))


def contiguous(x: Tensor, cu_seqlens: Tensor, rank: int, ranks: int) -> Tensor:
    return torch.cat([s.chunk(ranks)[rank] for s in x.tensor_split(cu_seqlens[1:-1].tolist())])


SHARD = {"contiguous": contiguous, "zigzag": zigzag}
CASES = [(layout, exclusive) for layout in SHARD for exclusive in (True, False)]


def sums_of_a_shard(rank: int, x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    group = torch.distributed.group.WORLD
    return [
        segmented_suffix_sum(
            SHARD[layout](x, cu_seqlens, rank, group.size()),
            cu_seqlens,
            exclusive=exclusive,
            group=group,
            layout=layout,
        )
        for layout, exclusive in CASES
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_equal_one(ranks):
    cu = bounds([16, 8, 0, 40, 8])
    x = torch.randn(72)
    by_rank = run_ranks(ranks, sums_of_a_shard, x, cu)
    for rank, results in enumerate(by_rank):
        for (layout, exclusive), out in zip(CASES, results, strict=True):
            expected = SHARD[layout](reference.suffix_sum(x, cu, exclusive), cu, rank, ranks)
            torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([1, 3, 6]), "cu_seqlens must start at 0, got 1"),
        (torch.tensor([0, 4, 3, 6]), "cu_seqlens must not decrease, got 4 then 3 at segment 1"),
        (torch.tensor([0, 3, 5]), "cu_seqlens must end at the number of tokens 6, got 5; a padded tail"),
        (torch.tensor([0, 2**32 + 6]), r"beyond the 2\^31 - 1 tokens of a pack \(1 of 2\)"),
        (torch.tensor([-(2**32), 6]), "beyond the"),
        (torch.tensor([0.0, 6.0]), "cu_seqlens must be integers"),
        (torch.tensor([[0, 6]]), r"cu_seqlens must be integers of shape \[segments \+ 1\]"),
        (torch.tensor([], dtype=torch.int32), r"got torch.int32 \(0,\)"),
    ],
)
def test_bad_boundaries_are_refused(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        segmented_suffix_sum(torch.randn(6), cu_seqlens)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(6).double(), "x must be Float, got Double"),
        (torch.randn(2, 3), r"x must have shape \[6\], got \[2, 3\]"),
    ],
)
def test_bad_values_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        segmented_suffix_sum(x, torch.tensor([0, 6]))


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout must be 'contiguous' or 'zigzag', got 'striped'"):
        segmented_suffix_sum(torch.randn(6), torch.tensor([0, 6]), layout="striped")


BAD_PACKS = [
    ("contiguous", [0, 7, 16], "segment 0 has 7 tokens, not divisible by 2 "),
    (
        "zigzag",
        [0, 10, 16],
        "segment 0 has 10 tokens, not divisible by 4 (2 context-parallel ranks, zigzag layout)",
    ),
    ("zigzag", [4, 8, 20], "cu_seqlens must start at 0 and not decrease, got [4, 8, 20]"),
    ("zigzag", [0, 20, 16], "cu_seqlens must start at 0 and not decrease, got [0, 20, 16]"),
    ("zigzag", [0, 8], "must end at 16 (2 context-parallel ranks x 8 tokens here), got 8"),
]


def errors_of_bad_packs(rank: int) -> list[str]:
    messages = []
    for layout, cu, _ in BAD_PACKS:
        with pytest.raises(ValueError) as caught:
            segmented_suffix_sum(
                torch.randn(8), torch.tensor(cu), group=torch.distributed.group.WORLD, layout=layout
            )
        messages.append(str(caught.value))
    return messages


def test_packs_that_ranks_cannot_share_are_refused_on_every_rank():
    for messages in run_ranks(2, errors_of_bad_packs):
        for (_, _, expected), message in zip(BAD_PACKS, messages, strict=True):
            assert expected in message
