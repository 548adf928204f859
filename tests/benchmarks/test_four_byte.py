"""The four-byte scheme against float64: as exact as the package's gradients, where it could go wrong too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pear_megatron import vocab_parallel_logprob
from tests.distributed import run_ranks

TOKENS, HIDDEN, COLUMNS, WORDS = 96, 24, 128, 101
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def make_problem(dtype: torch.dtype, scale: float = 3.0) -> dict[str, Tensor]:
    """Some rows sure of their target, some of another token, some off the mask."""
    weight = torch.randn(COLUMNS, HIDDEN)
    target = torch.randint(WORDS, (TOKENS,))
    hidden = torch.randn(TOKENS, HIDDEN) * scale / HIDDEN**0.5
    hidden[:20] = weight[target[:20]]  # their logit is HIDDEN, give or take: p is 1 - 1e-6
    hidden[20:40] = weight[(target[20:40] + 1) % WORDS]
    mask = torch.rand(TOKENS) < 0.8
    mask[:20] = True
    target = target.where(mask, -100)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "target": target,
        "mask": mask,
        "grad": torch.randn(TOKENS),
    }


def exact(p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Float64, from logits that are rounded as a GEMM of the problem's dtype rounds them."""
    hidden, weight = p["hidden"].double(), p["weight"].double()
    logits = (hidden @ weight.t()).to(p["hidden"].dtype).double()[:, :WORDS]
    logprob = logits.log_softmax(-1)
    grad = p["grad"].double().where(p["mask"], 0.0)[:, None]
    target = p["target"].clamp_min(0)
    grad_logits = -grad * logprob.exp()
    # 1 - p as the sum of the others, exact where p is nearly 1
    others = logprob.exp().scatter(1, target[:, None], 0.0).sum(1, keepdim=True)
    grad_logits.scatter_(1, target[:, None], grad * others)
    out = logprob.gather(1, target[:, None])[:, 0].where(p["mask"], 0.0)
    return (
        out,
        grad_logits @ weight[:WORDS],
        torch.nn.functional.pad(grad_logits.t() @ hidden, (0, 0, 0, COLUMNS - WORDS)),
    )


def answers(p: dict[str, Tensor], four: bool, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from experiments.four_byte import four_byte_logprob

    hidden, weight = (p[name].clone().requires_grad_() for name in ("hidden", "weight"))
    common = {"mask": p["mask"], "vocab_size": WORDS, **kwargs}
    if four:
        out = four_byte_logprob(hidden, weight, p["target"], **common)
    else:
        out = vocab_parallel_logprob(hidden @ weight.t(), p["target"], **common)
    out.backward(p["grad"])
    return out.detach(), hidden.grad, weight.grad


def test_in_float32_it_is_float64_rounded():
    p = make_problem(torch.float32)
    for got, expected in zip(answers(p, True), exact(p), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-5)


def test_in_bfloat16_it_is_as_exact_as_six_bytes():
    p = make_problem(torch.bfloat16)
    for got, theirs, expected in zip(answers(p, True), answers(p, False), exact(p), strict=True):
        error, their_error = ((x.double() - expected).norm() for x in (got, theirs))
        assert error < 1.5 * their_error


def test_rows_that_are_sure_of_their_token_keep_their_small_gradient():
    """Each to a hundredth of its own size, which is a millionth of the others'."""
    p = make_problem(torch.bfloat16)
    expected = exact(p)[1][:20]
    assert expected.norm(dim=1).min() < 1e-4
    error = (answers(p, True)[1][:20].double() - expected).norm(dim=1)
    # float32's rounding of a log-sum-exp near HIDDEN bounds what 1 - p can be
    assert (error < 0.01 * expected.norm(dim=1) + 1e-5).all()


def shard(rank: int, p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    sys.path.insert(0, str(BENCHMARKS))
    group = torch.distributed.group.WORLD
    mine = {**p, "weight": p["weight"].chunk(2)[rank]}
    return answers(mine, True, tp_group=group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("below", [0.0, 40.0, 400.0])
def test_a_rank_whose_maximum_is_far_below_the_others(dtype, below):
    """Two ranks; one feature lowers every logit of the second by ``below``: factors of exp(-40), and of 0."""
    p = make_problem(dtype)
    p["hidden"][:, 0] = 1.0
    p["weight"][64:, 0] = -below
    p["weight"][:64, 0] = 0.0
    shards = run_ranks(2, shard, p)
    expected = exact(p)
    tolerance = 1e-4 if dtype == torch.float32 else 2**-6
    for logprob, hidden_grad, _ in shards:
        for got, wanted in ((logprob, expected[0]), (hidden_grad, expected[1])):
            torch.testing.assert_close(
                got.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())
            )
    weight_grad = torch.cat([s[2] for s in shards]).double()
    for half in (slice(0, 64), slice(64, COLUMNS)):  # each against its own size
        limit = tolerance * float(expected[2][half].abs().max())
        torch.testing.assert_close(weight_grad[half], expected[2][half], rtol=tolerance, atol=limit)


KERNEL = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from experiments.four_byte import exp_forward_
from experiments.four_byte_kernel import exp_forward_kernel_
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for tokens, columns, start, size in ((3, 5000, 0, 4700), (4, 100, 50, 107), (2, 64, 128, 100), (2, 4096, 0, 4096)):
        logits = (4 * torch.randn(tokens, columns)).to(dtype)
        target = torch.randint(size, (tokens,))
        for mask in (None, torch.arange(tokens) % 2 == 0):
            wanted, got = logits.clone(), logits.clone()
            stats = exp_forward_(wanted, target, mask, start, size)
            torch.testing.assert_close(exp_forward_kernel_(got, target, mask, start, size), stats)
            torch.testing.assert_close(got, wanted, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
print("equal")
"""


def test_the_kernel_interpreted_on_the_cpu_does_what_the_definition_says():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", KERNEL, str(BENCHMARKS)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.stdout.endswith("equal\n"), run.stderr[-3000:]
