"""The KL of a stored top-k and the entropy on one rank: values, gradients, layouts, masks, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pear_megatron import vocab_parallel_logprob, vocab_parallel_topk_kl
from pear_megatron.ops import reference
from pear_megatron.ops.statistics import TokenStatistics, vocab_parallel_statistics
from tests.ops.test_logprob import DTYPES, ROUNDING

INF, NAN = float("inf"), float("nan")
TAILS = ["none", "bucket"]


@dataclass
class Problem:
    """Logits [T, V], the rest [T] or [T, k]."""

    logits: Tensor
    target: Tensor
    ids: Tensor
    logprobs: Tensor
    mask: Tensor
    grad: Tensor
    kl_grad: Tensor

    @classmethod
    def random(cls, rows: int, columns: int, k: int, dtype: torch.dtype = torch.float32) -> Problem:
        """A behaviour policy near the target policy, with its k likeliest tokens; not all rows have all k."""
        logits = (3 * torch.randn(rows, columns)).to(dtype)
        behavior = (logits.float() + torch.randn(rows, columns)).log_softmax(-1)
        logprobs, ids = behavior.topk(k)
        ids[1::3, 1:] = ids[1::3, 1:].where(torch.rand(ids[1::3, 1:].shape) < 0.7, -1)
        target = torch.randint(columns, (rows,))
        target[::2] = ids[::2, 0]  # in the top-k, and perhaps not
        return cls(
            logits,
            target,
            ids.int(),
            logprobs.contiguous(),
            torch.rand(rows) < 0.8,
            torch.randn(rows),
            torch.randn(rows),
        )

    def topk(self) -> tuple[Tensor, Tensor]:
        return self.ids, self.logprobs

    def exact(self, tail: str, vocab_size: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs, KL, entropy [T], and the gradient [T, V] of both, weighted by grad and kl_grad; float64."""
        logits = self.logits.detach().double().requires_grad_()
        lp = reference.logprob(logits, self.target, self.mask, vocab_size)
        kl = reference.topk_kl(logits, *self.topk(), self.mask, tail, vocab_size)
        (lp @ self.grad.double() + kl @ self.kl_grad.double()).backward()
        entropy = reference.entropy(self.logits, self.mask, vocab_size)
        return lp.detach(), kl.detach(), entropy, logits.grad

    def ours(self, tail: str, **options: Any) -> tuple[TokenStatistics, Tensor]:
        leaf = self.logits.detach().clone().requires_grad_()
        found = vocab_parallel_statistics(
            leaf * 1.0, self.target, topk=self.topk(), tail=tail, mask=self.mask, entropy=True, **options
        )
        (found.logprob @ self.grad + found.kl @ self.kl_grad).backward()
        return found, leaf.grad


def assert_close(got: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """To float32's accuracy, or to the rounding of a gradient stored in dtype."""
    relative, absolute = ROUNDING[dtype]
    # What float32 loses of p - q, before it is rounded.
    torch.testing.assert_close(got.double(), exact, rtol=1.02 * relative, atol=1.02 * absolute + 2e-6)


def check(problem: Problem, tail: str, vocab_size: int | None = None) -> None:
    lp, kl, entropy, gradient = problem.exact(tail, vocab_size)
    gradients = []
    for inplace in (False, True):
        found, got = problem.ours(tail, vocab_size=vocab_size, inplace_backward=inplace)
        for ours, exact in zip(found, (lp, kl, entropy), strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
        assert not found.entropy.requires_grad
        assert_close(got, gradient, problem.logits.dtype)
        gradients.append(got)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("columns", "k"), [(1, 1), (7, 3), (130, 128), (2049, 1), (2100, 64), (50257, 128)])
def test_values_and_gradients_equal_float64(dtype, tail, columns, k):
    check(Problem.random(17 if columns < 50257 else 3, columns, k, dtype), tail)


@pytest.mark.parametrize("tail", TAILS)
def test_gradients_equal_finite_differences(tail):
    problem = Problem.random(5, 9, 3)
    problem.mask[:] = True
    _, gradient = problem.ours(tail)
    step = 1e-5

    def value(logits: Tensor) -> Tensor:
        kl = reference.topk_kl(logits, *problem.topk(), problem.mask, tail)
        return (
            reference.logprob(logits, problem.target) @ problem.grad.double() + kl @ problem.kl_grad.double()
        )

    for column in range(9):
        moved = torch.zeros(5, 9, dtype=torch.float64)
        for row in range(5):
            moved.zero_()[row, column] = step
            slope = (value(problem.logits.double() + moved) - value(problem.logits.double() - moved)) / (
                2 * step
            )
            torch.testing.assert_close(gradient[row, column].double(), slope, rtol=1e-4, atol=1e-5)


def test_by_hand():
    """pi = (1/2, 1/4, 1/4), q = (1/2, 1/4) of which a quarter is not stored."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    topk = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[0.5, 0.25]]).log()
    kl = vocab_parallel_topk_kl(logits, *topk)
    two, three = torch.tensor([2.0, 3.0]).log()
    torch.testing.assert_close(kl[0], 2 / 3 * (2 * two - three) + 1 / 3 * (2 * two - three))
    torch.testing.assert_close(vocab_parallel_topk_kl(logits, *topk, tail="bucket"), torch.zeros(1))
    found = vocab_parallel_statistics(logits, torch.tensor([2]), entropy=True)
    assert found.kl is None
    torch.testing.assert_close(found.entropy[0], 1.5 * two)


@pytest.mark.parametrize("tail", TAILS)
def test_logits_alike_have_no_divergence_and_no_gradient(tail):
    logits = (3 * torch.randn(6, 40)).requires_grad_()
    logprobs, ids = logits.detach().log_softmax(-1).topk(40)
    kl = vocab_parallel_topk_kl(logits, ids.int(), logprobs, tail=tail)
    kl.sum().backward()
    torch.testing.assert_close(kl, torch.zeros(6), rtol=0, atol=2e-6)
    torch.testing.assert_close(logits.grad, torch.zeros(6, 40), rtol=0, atol=2e-6)


def test_the_kl_alone_is_that_beside_the_log_probs():
    problem = Problem.random(9, 300, 5, torch.bfloat16)
    leaf = problem.logits.clone().requires_grad_()
    kl = vocab_parallel_topk_kl(leaf, *problem.topk(), mask=problem.mask, tail="bucket")
    kl.backward(problem.kl_grad)
    found, gradient = replace(problem, grad=torch.zeros(9)).ours("bucket")
    assert torch.equal(kl, found.kl)
    assert torch.equal(leaf.grad, gradient)


def test_kl_and_entropy_are_beside_the_same_log_probs():
    problem = Problem.random(9, 3000, 5, torch.bfloat16)
    plain = vocab_parallel_logprob(problem.logits, problem.target, mask=problem.mask)
    for entropy, topk in ((False, None), (True, None), (False, problem.topk()), (True, problem.topk())):
        found = vocab_parallel_statistics(
            problem.logits, problem.target, mask=problem.mask, entropy=entropy, topk=topk
        )
        if topk is None:
            assert torch.equal(found.logprob, plain)
        torch.testing.assert_close(found.logprob, plain, rtol=1e-6, atol=1e-6)  # sums in another order
        assert (found.entropy is not None, found.kl is not None) == (entropy, topk is not None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0])
def test_what_a_confident_model_leaves_outside_the_top_k_is_not_lost(dtype, gap):
    """down to e^-40 = 4e-18 of the mass, which a difference of float32 sums could not tell from nothing."""
    rows, columns, k = 40, 1003, 16
    logits = torch.randn(rows, columns)
    logits[:, :k] += gap + math.log(columns / k)
    ids = torch.stack([torch.randperm(k) for _ in range(rows)]).int()
    logits = logits.to(dtype)
    logprobs = (0.99 * torch.randn(rows, k).softmax(-1)).log()
    problem = Problem(
        logits,
        torch.randint(columns, (rows,)),
        ids,
        logprobs,
        torch.ones(rows, dtype=torch.bool),
        torch.zeros(rows),
        torch.ones(rows),
    )
    _, expected, entropy, exact = problem.exact("bucket")
    found, got = problem.ours("bucket")
    torch.testing.assert_close(found.kl.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    # What is left of q is a difference of float32 numbers too, but of the data's.
    relative, smallest = ROUNDING[dtype][0] + 5e-5, 3.1e-8 if dtype == torch.float16 else 1e-9
    torch.testing.assert_close(got[:, k:].double(), exact[:, k:], rtol=relative, atol=smallest)


def test_the_entropy_alone_leaves_the_gradient_as_it_is():
    logits, target = torch.randn(5, 70, requires_grad=True), torch.arange(5)
    gradients = [
        torch.autograd.grad(vocab_parallel_statistics(logits, target, entropy=e).logprob.sum(), logits)[0]
        for e in (False, True)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("tail", TAILS)
def test_entries_may_come_in_any_order_and_with_gaps(tail):
    problem = Problem.random(6, 50, 4)
    order = torch.tensor([2, 0, 3, 1])
    gaps = torch.full((6, 3), -1, dtype=torch.int32), torch.full((6, 3), NAN)
    moved = replace(
        problem,
        ids=torch.cat([gaps[0], problem.ids[:, order]], 1),
        logprobs=torch.cat([gaps[1], problem.logprobs[:, order]], 1),
    )
    for ours, other in zip(problem.ours(tail)[0], moved.ours(tail)[0], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(problem.ours(tail)[1], moved.ours(tail)[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_rows_off_the_mask_are_zero_whatever_they_hold(tail):
    problem = Problem.random(6, 50, 4)
    problem.mask = torch.tensor([True, False, False, True, False, True])
    clean, gradient = problem.ours(tail)
    off = ~problem.mask
    problem.logits[off], problem.target[off] = NAN, -100
    problem.ids[off], problem.logprobs[off] = torch.tensor([-7, 999, 3, 3], dtype=torch.int32), INF
    found, got = problem.ours(tail)
    for ours, before in zip(found, clean, strict=True):
        assert torch.equal(ours, before)
        assert not ours[off].any()
    assert torch.equal(got, gradient)
    assert not got[off].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [NAN, INF, -INF, 6e4])
def test_padded_columns_stay_out_and_get_no_gradient(dtype, padding):
    problem = Problem.random(6, 101, 4, dtype)
    expected, gradient = problem.ours("bucket")
    wide = torch.full((6, 128), padding, dtype=dtype)
    wide[:, :101] = problem.logits
    found, got = replace(problem, logits=wide).ours("bucket", vocab_size=101)
    for ours, before in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[:, :101], gradient, rtol=2**-7, atol=1e-6)
    assert not got[:, 101:].any()


def test_megatrons_transposed_logits_are_not_copied():
    problem = Problem.random(15, 40, 4)
    exact = problem.exact("none")[3]
    hidden = problem.logits.view(3, 5, 40).transpose(0, 1).contiguous().requires_grad_()  # [s, b, v]
    produced = hidden * 1.0
    found = vocab_parallel_statistics(
        produced.transpose(0, 1),
        problem.target.view(3, 5),
        topk=(problem.ids.view(3, 5, 4), problem.logprobs.view(3, 5, 4)),
        mask=problem.mask.view(3, 5),
        inplace_backward=True,
    )
    (found.logprob.flatten() @ problem.grad + found.kl.flatten() @ problem.kl_grad).backward()
    # The gradient was written over the logits themselves, so no copy stood between.
    assert_close(produced.detach().transpose(0, 1).reshape(15, 40), exact)
    assert torch.equal(hidden.grad, produced.detach())


def test_nan_and_plus_inf_stay_visible_and_minus_inf_is_no_probability():
    logits = torch.randn(6, 3000)
    logits[0, 2500] = NAN
    logits[1, 10] = INF
    logits[2, 1000:2990] = -INF
    logits[3, :2990] = -INF  # a whole block of the kernel
    logits[4] = -INF
    ids = torch.tensor([[2995, 2999]] * 5 + [[5, 2999]], dtype=torch.int32)
    logits[5, 5] = -INF  # a token of the top-k that the target policy never says
    logits.requires_grad_()
    logprobs = torch.tensor([[0.25, 0.5]] * 6).log()
    target = torch.full((6,), 2995)
    found = vocab_parallel_statistics(logits, target, topk=(ids, logprobs), entropy=True)
    mask = torch.ones(6, dtype=torch.bool)
    for ours, exact in (
        (found.entropy, reference.entropy(logits)),
        (found.kl, reference.topk_kl(logits, ids, logprobs, mask)),
    ):
        for visible in (0, 1, 4):
            assert ours[visible].isnan()
        torch.testing.assert_close(ours[[2, 3, 5]].double(), exact[[2, 3, 5]], rtol=1e-5, atol=1e-5)
    assert found.kl[5] == INF
    found.kl[[2, 3, 5]].sum().backward()
    assert logits.grad[[2, 3, 5]].isfinite().all()


def test_extreme_logits_give_no_nan():
    for scale in (30.0, 1e4):
        logits = (scale * torch.randn(16, 3000)).requires_grad_()
        logprobs, ids = (logits.detach() + torch.randn(16, 3000)).log_softmax(-1).topk(4)
        found = vocab_parallel_statistics(
            logits, ids[:, 0], topk=(ids.int(), logprobs), tail="bucket", entropy=True
        )
        torch.testing.assert_close(found.entropy.double(), reference.entropy(logits), rtol=1e-5, atol=1e-5)
        assert found.kl.isfinite().all()
        found.kl.sum().backward()
        assert logits.grad.isfinite().all()
        assert logits.grad.abs().max() <= 2


@pytest.mark.parametrize(("largest", "log_rest", "pushed"), [(60.0, -59.6867, 0.25), (200.0, -80.0, 0.0)])
def test_a_model_that_is_certain_of_the_top_k_is_pushed_out_of_it_while_float32_can_tell(
    largest, log_rest, pushed
):
    logits = torch.tensor([[largest, 0.0, -1.0]], requires_grad=True)
    topk = torch.tensor([[0]], dtype=torch.int32), torch.tensor([[0.75]]).log()
    kl = vocab_parallel_topk_kl(logits, *topk, tail="bucket")
    kl.sum().backward()
    expected = 0.75 * math.log(0.75) + 0.25 * (math.log(0.25) - log_rest)
    torch.testing.assert_close(kl.item(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor(0.25))
    torch.testing.assert_close(logits.grad[0, 1:], -pushed * torch.tensor([0.0, -1.0]).softmax(0))


def test_stored_mass_above_one_leaves_no_rest():
    logits = torch.randn(1, 9, requires_grad=True)
    topk = torch.tensor([[2, 3]], dtype=torch.int32), torch.tensor([[0.6, 0.4000004]]).log()
    bucket, none = (vocab_parallel_topk_kl(logits, *topk, tail=tail) for tail in ("bucket", "none"))
    torch.testing.assert_close(bucket, none, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "logprobs", "error", "message"),
    [
        ([3, 50], [-1.0, -1.0], IndexError, "id 50 at token 2 is outside the vocabulary of 50; give -1"),
        ([3, -2], [-1.0, -1.0], IndexError, "id -2 at token 2 is outside the vocabulary of 50"),
        ([3, 3], [-1.0, -2.0], ValueError, "id 3 at token 2 is there twice; keep one"),
        ([-1, -1], [-1.0, -2.0], ValueError, "token 2 is a decision without a top-k entry of any mass"),
        ([3, -1], [-INF, -2.0], ValueError, "token 2 is a decision without a top-k entry of any mass"),
        ([3, 4], [-1.0, 0.5], ValueError, "log-prob of id 4 at token 2 is 0.5, which is none"),
        ([3, 4], [NAN, -0.5], ValueError, "log-prob of id 3 at token 2 is nan"),
    ],
)
def test_a_top_k_that_is_none_is_refused_with_its_place(ids, logprobs, error, message):
    problem = Problem.random(4, 50, 2)
    problem.mask[:] = True
    problem.ids[2:], problem.logprobs[2:] = torch.tensor(ids, dtype=torch.int32), torch.tensor(logprobs)
    with pytest.raises(error, match=message):
        problem.ours("none")
    problem.mask[2:] = False
    problem.ours("none")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk": torch.zeros(4, 2)}, TypeError, "must be a pair of tensors"),
        (
            {"ids": torch.zeros(4, 2, dtype=torch.int64)},
            ValueError,
            r"topk_ids is torch.int64, .*topk_ids.int\(\)",
        ),
        ({"logprobs": torch.zeros(4, 2).double()}, ValueError, r"topk_logprobs.float\(\)"),
        (
            {"logprobs": torch.zeros(4, 3)},
            ValueError,
            r"topk_logprobs has shape \(4, 3\) and topk_ids \(4, 2\)",
        ),
        ({"ids": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, "for the 4 tokens of target"),
        ({"ids": torch.zeros(4, 0, dtype=torch.int32)}, ValueError, "k > 0"),
        ({"logprobs": torch.zeros(4, 2).requires_grad_()}, ValueError, r"topk_logprobs.detach\(\)"),
        ({"tail": "rest"}, ValueError, "tail must be 'none' or 'bucket', got 'rest'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    given = {
        "ids": torch.zeros(4, 2, dtype=torch.int32),
        "logprobs": torch.zeros(4, 2),
        "tail": "none",
        **change,
    }
    topk = given.get("topk", (given["ids"], given["logprobs"]))
    with pytest.raises(error, match=message):
        vocab_parallel_statistics(
            torch.randn(4, 50), torch.zeros(4, dtype=torch.int64), topk=topk, tail=given["tail"]
        )


def test_a_top_k_changed_between_forward_and_backward_is_an_error():
    problem = Problem.random(4, 50, 2)
    logits = problem.logits.requires_grad_()
    kl = vocab_parallel_topk_kl(logits, *problem.topk(), mask=problem.mask)
    problem.logprobs.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.sum().backward()


def test_no_tokens():
    logits = torch.randn(0, 50, requires_grad=True)
    topk = torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, 3)
    found = vocab_parallel_statistics(logits, torch.zeros(0, dtype=torch.int64), topk=topk, entropy=True)
    (found.kl.sum() + found.logprob.sum()).backward()
    assert [x.shape for x in found] == [(0,)] * 3
    assert logits.grad.shape == (0, 50)


def test_nothing_the_size_of_the_logits_is_allocated():
    problem = Problem.random(64, 8192, 4)
    produced = problem.logits.requires_grad_() * 1.0
    with torch.profiler.profile(profile_memory=True) as profile:
        found = vocab_parallel_statistics(
            produced,
            problem.target,
            topk=problem.topk(),
            mask=problem.mask,
            entropy=True,
            inplace_backward=True,
        )
        torch.autograd.grad(found.kl.sum(), produced)
    assert max(e.self_cpu_memory_usage for e in profile.events()) < problem.logits.nbytes / 100
