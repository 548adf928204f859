"""vocab_parallel_logprob on one rank: values, gradients, layouts, masks, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pear_megatron import _C, vocab_parallel_logprob
from pear_megatron.ops import reference
from pear_megatron.ops.library import ops
from pear_megatron.ops.statistics import vocab_parallel_statistics

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative rounding error of a gradient stored in this dtype, and the absolute one near zero.
ROUNDING = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2**-8, 1e-9), torch.float16: (2**-11, 2**-25)}


def float64_answer(
    logits: Tensor, target: Tensor, grad: Tensor, mask: Tensor | None = None, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T] and the gradient of (grad * logprob).sum() [T, V], in float64."""
    exact = logits.detach().double().requires_grad_()
    logprob = reference.logprob(exact, target, mask, vocab_size)
    logprob.backward(grad.double())
    return logprob.detach(), exact.grad


def assert_rounds_to(got: Tensor, exact: Tensor) -> None:
    relative, absolute = ROUNDING[got.dtype]
    torch.testing.assert_close(got.double(), exact, rtol=1.02 * relative, atol=1.02 * absolute)


def check(logits: Tensor, target: Tensor, **kwargs) -> None:
    """Values and gradients, in place and not, against float64."""
    grad = torch.randn(target.shape)
    vocab = {"vocab_size": kwargs.get("vocab_size")}
    logprob, exact = float64_answer(logits, target, grad, kwargs.get("mask"), **vocab)
    gradients = []
    for inplace in (False, True):
        leaf = logits.detach().clone().requires_grad_()
        out = vocab_parallel_logprob(leaf.clone(), target, inplace_backward=inplace, **kwargs)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), logprob, rtol=1e-5, atol=1e-5, equal_nan=True)
        out.backward(grad)
        assert_rounds_to(leaf.grad, exact)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 15, 16, 17, 2047, 2048, 2049, 50257])
def test_values_and_gradients_equal_float64_at_every_width(dtype, columns):
    rows = 33 if columns < 50257 else 5
    check((4 * torch.randn(rows, columns)).to(dtype), torch.randint(columns, (rows,)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", ["default", "avx2", "avx512"])
def test_the_kernels_of_every_instruction_set_equal_float64(monkeypatch, wanted, dtype):
    """torch's own environment variable chooses among those that the machine has."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", wanted)
    if _C.cpu_instruction_set() != {"default": "baseline"}.get(wanted, wanted):
        pytest.skip(f"this machine has no {wanted}")
    for columns in (1, 15, 33, 2051, 4200):
        logits, target = (4 * torch.randn(5, columns)).to(dtype), torch.randint(columns, (5,))
        logits[1, : columns // 2] = -INF
        target[1] = columns - 1
        check(logits, target)
        entropy = vocab_parallel_statistics(logits, target, entropy=True).entropy
        expected = reference.entropy(logits, torch.ones(5, dtype=torch.bool))
        torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_of_any_bits_stays_one(dtype):
    ones = torch.full((2,), -1, dtype=torch.int32).view(torch.float32)  # a NaN that rounding up would wrap
    logits, target, fine = torch.randn(2, 40).to(dtype), torch.tensor([3, 4]), torch.ones(2)
    for max, log_sum, grad in ((ones, fine, fine), (fine, ones, fine), (fine, fine, ones)):
        normalizer = torch.stack([max, log_sum], dim=1)
        out = ops.statistics_backward(logits, target, None, normalizer, grad, 0, 40)
        assert out.isnan().all()


@pytest.mark.parametrize("offset", [30.0, 1e3, 1e5])
def test_gradients_do_not_round_as_coarsely_as_the_logits_are_large(offset):
    logits = torch.randn(8, 300)
    logits[:, 3] += 12  # a token that the model is nearly certain of: its gradient is 1 - p
    logits = (logits + offset).requires_grad_()
    target = torch.full((8,), 3)
    vocab_parallel_logprob(logits, target).sum().backward()
    _, exact = float64_answer(logits.detach(), target, torch.ones(8))
    torch.testing.assert_close(logits.grad.double(), exact, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_of_262144(dtype):
    check((4 * torch.randn(3, 262144)).to(dtype), torch.tensor([0, 262143, 131072]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_rows_may_be_slices_of_wider_ones(dtype, offset):
    wide = torch.randn(9, 250).to(dtype)
    logits = wide[:, offset : offset + 201].requires_grad_()
    target, grad = torch.randint(201, (9,)), torch.randn(9)
    logprob, exact = float64_answer(logits, target, grad)
    out = vocab_parallel_logprob(logits, target)
    torch.testing.assert_close(out.double(), logprob, rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(out, logits, grad)
    assert_rounds_to(got, exact)


@pytest.mark.parametrize("mask", [[True, False, False, True], [False] * 4])
def test_rows_off_the_mask_are_zero_whatever_they_hold(mask):
    mask = torch.tensor(mask)
    logits, target = torch.randn(4, 50), torch.randint(50, (4,))
    logits[~mask] = torch.tensor([NAN, INF]).repeat(25)
    target[~mask] = torch.tensor([-100, 2**60])[: int((~mask).sum())].repeat(2)[: int((~mask).sum())]
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        out = vocab_parallel_logprob(leaf.clone(), target, mask=mask, inplace_backward=inplace)
        out.sum().backward()
        assert torch.equal(out[~mask], torch.zeros(int((~mask).sum())))
        assert torch.equal(leaf.grad[~mask], torch.zeros(int((~mask).sum()), 50))
        alone = vocab_parallel_logprob(logits[mask], target[mask])
        assert torch.equal(out[mask], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [NAN, INF, -INF, 6e4])
def test_padded_columns_stay_out_of_the_softmax_and_get_no_gradient(dtype, padding):
    logits = torch.randn(6, 128).to(dtype)
    logits[:, 101:] = padding
    target, grad = torch.randint(101, (6,)), torch.randn(6)
    logprob, exact = float64_answer(logits[:, :101], target, grad)
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        out = vocab_parallel_logprob(leaf.clone(), target, vocab_size=101, inplace_backward=inplace)
        out.backward(grad)
        torch.testing.assert_close(out.double(), logprob, rtol=1e-5, atol=1e-5)
        assert_rounds_to(leaf.grad[:, :101], exact)
        assert torch.equal(leaf.grad[:, 101:], torch.zeros(6, 27, dtype=dtype))


def test_megatrons_transposed_logits_are_not_copied():
    hidden = torch.randn(5, 3, 40, requires_grad=True)  # [s, b, v]
    produced = hidden * 1.0
    before = produced.detach().clone()
    target, mask = torch.randint(40, (3, 5)), torch.rand(3, 5) < 0.7  # [b, s]
    out = vocab_parallel_logprob(produced.transpose(0, 1), target, mask=mask, inplace_backward=True)
    assert out.shape == (3, 5)
    grad = torch.randn(3, 5)
    out.backward(grad)
    rows = before.transpose(0, 1).reshape(15, 40)
    logprob, exact = float64_answer(rows, target.flatten(), grad.flatten(), mask.flatten())
    torch.testing.assert_close(out.double().flatten(), logprob, rtol=1e-5, atol=1e-5)
    # The gradient was written over the logits themselves, so no copy stood between.
    assert_rounds_to(produced.detach().transpose(0, 1).reshape(15, 40), exact)
    assert torch.equal(hidden.grad, produced.detach())


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3)])
def test_any_leading_dimensions(shape):
    logits, target = torch.randn(*shape, 30), torch.randint(30, shape)
    out = vocab_parallel_logprob(logits, target)
    expected = reference.logprob(logits.reshape(-1, 30), target.reshape(-1)).view(shape)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_targets_and_masks_may_be_strided():
    logits, target, mask = torch.randn(6, 30), torch.randint(30, (12,)), torch.rand(12) < 0.5
    out = vocab_parallel_logprob(logits, target[::2], mask=mask[::2])
    assert torch.equal(out, vocab_parallel_logprob(logits, target[::2].clone(), mask=mask[::2].clone()))


def test_inplace_backward_writes_over_the_logits():
    produced = torch.randn(4, 33, requires_grad=True) * 1.0
    vocab_parallel_logprob(produced, torch.arange(4), inplace_backward=True).sum().backward()
    torch.testing.assert_close(produced.sum(-1), torch.zeros(4), rtol=0, atol=1e-5)  # rows of a gradient
    assert (produced[range(4), range(4)] > 0).all()


def test_a_second_backward_through_inplace_logits_raises():
    logits = torch.randn(4, 33, requires_grad=True)
    out = vocab_parallel_logprob(logits * 1.0, torch.arange(4), inplace_backward=True)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_raises():
    logits = torch.randn(4, 33, requires_grad=True)
    out = vocab_parallel_logprob(logits, torch.arange(4))
    (grad,) = torch.autograd.grad(out.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_logits_neither_overflow_nor_lose_the_answer(dtype, scale):
    logits = (scale * torch.randn(16, 3000)).clamp(-6e4, 6e4).to(dtype)
    best = logits.argmax(-1)
    for target in (best, torch.randint(3000, (16,))):
        out = vocab_parallel_logprob(logits, target)
        expected = reference.logprob(logits, target)
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    leaf = logits.requires_grad_()
    vocab_parallel_logprob(leaf, target).sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() <= 1


def test_nan_and_plus_inf_stay_visible_and_minus_inf_is_no_probability():
    logits = torch.randn(6, 3000)
    logits[0, 2500] = NAN
    logits[1, 10] = INF
    logits[2, 1000:2990] = -INF
    logits[3, :2990] = -INF  # a whole block of the kernel
    logits[4, 5] = -INF
    target = torch.tensor([0, 0, 2995, 2995, 5, 0])
    logits.requires_grad_()
    out = vocab_parallel_logprob(logits, target)
    expected = reference.logprob(logits, target)
    assert out[:2].isnan().all()
    assert out[4] == -INF
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    out[2:].sum().backward()
    assert logits.grad[2:].isfinite().all()
    assert vocab_parallel_logprob(torch.full((1, 5), -INF), torch.tensor([2])).isnan()


@pytest.mark.parametrize("rest", [-INF, 0.0], ids=["alone", "with_finite_columns"])
def test_nan_among_nothing_but_minus_inf_stays_visible(rest):
    logits = torch.full((1, 5000), rest)
    logits[:, :2048] = -INF  # a whole block of the kernel
    logits[0, 700] = NAN
    assert vocab_parallel_logprob(logits, torch.tensor([4000])).isnan()


def test_no_tokens():
    logits = torch.randn(0, 50, requires_grad=True)
    out = vocab_parallel_logprob(logits, torch.zeros(0, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0,)
    assert logits.grad.shape == (0, 50)


@pytest.mark.parametrize(("bad", "vocab_size"), [(-1, None), (-100, None), (50, None), (45, 45)])
def test_a_target_outside_the_vocabulary_names_token_and_value(bad, vocab_size):
    target = torch.tensor([3, 4, bad, bad])
    with pytest.raises(IndexError, match=f"target {bad} at token 2 is outside the vocabulary of"):
        vocab_parallel_logprob(torch.randn(4, 50), target, vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.randn(4, 50).double()}, "logits must be float32, bfloat16 or float16, got Double"),
        ({"logits": torch.randn(4, 0)}, r"V > 0, got shape \(4, 0\)"),
        ({"logits": torch.tensor(1.0)}, r"logits must be \[..., V\]"),
        (
            {"target": torch.zeros(4, dtype=torch.int32)},
            r"target must be int64, got torch.int32; give target.long\(\)",
        ),
        ({"target": torch.zeros(5, dtype=torch.int64)}, r"target has shape \(5,\), but logits \(4, 50\)"),
        ({"mask": torch.ones(4)}, "mask must be bool .True on decisions., got torch.float32"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, r"mask has shape \(2, 2\)"),
        ({"vocab_size": 51}, "vocab_size 51 does not fit: 1 rank.* 50 columns"),
        ({"vocab_size": 0}, "vocab_size 0 does not fit"),
    ],
)
def test_wrong_shapes_and_dtypes_are_named(change, message):
    arguments = {"logits": torch.randn(4, 50), "target": torch.zeros(4, dtype=torch.int64), **change}
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprob(arguments.pop("logits"), arguments.pop("target"), **arguments)


def test_nothing_the_size_of_the_logits_is_allocated_but_an_asked_for_gradient():
    logits = torch.randn(64, 4096, requires_grad=True)
    target, mask = torch.randint(4000, (64,)), torch.rand(64) < 0.9

    def largest_allocation(inplace: bool) -> tuple[int, int]:
        produced = logits * 1.0
        with torch.profiler.profile(profile_memory=True) as forward:
            out = vocab_parallel_logprob(
                produced, target, mask=mask, vocab_size=4000, inplace_backward=inplace
            )
        grad = torch.ones(64)
        with torch.profiler.profile(profile_memory=True) as backward:
            torch.autograd.grad(out, produced, grad)
        return tuple(max(e.self_cpu_memory_usage for e in p.events()) for p in (forward, backward))

    full = logits.nbytes
    forward, backward = largest_allocation(inplace=False)
    assert forward < full / 100
    assert backward == full  # so the measurement sees what a kernel allocates
    forward, backward = largest_allocation(inplace=True)
    assert forward < full / 100
    assert backward < full / 100
