"""linear_logprob and pear_linear_loss against the whole logits and against float64, on one rank and on several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pear_megatron import PearConfig, linear_logprob, pear_linear_loss, pear_loss, vocab_parallel_logprob
from pear_megatron.ops import reference
from tests.distributed import run_ranks
from tests.packs import CONFIGS, config_id

TOKENS, HIDDEN, COLUMNS, WORDS = 21, 12, 64, 51
# Relative error, of each tensor's largest entry: bfloat16 rounds logits and their gradients on the way.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def make_problem(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> dict[str, Tensor]:
    target, mask = torch.randint(WORDS, (tokens,)), torch.rand(tokens) < 0.7
    target[~mask] = -100
    return {
        "hidden": torch.randn(tokens, HIDDEN).to(dtype),
        "weight": torch.randn(COLUMNS, HIDDEN).to(dtype),
        "target": target,
        "mask": mask,
        "grad": torch.randn(tokens),
    }


def assert_near(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        got.double(), exact.double(), rtol=0, atol=TOLERANCE[dtype] * float(exact.abs().max())
    )


def chunked(p: dict[str, Tensor], chunk_tokens: int, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and both gradients."""
    hidden, weight = (p[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    out = linear_logprob(
        hidden, weight, p["target"], chunk_tokens=chunk_tokens, mask=p["mask"], vocab_size=WORDS, **kwargs
    )
    out.backward(p["grad"])
    return out.detach(), hidden.grad, weight.grad


def float64_answer(p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (p[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    out = reference.logprob(hidden @ weight.t(), p["target"], p["mask"], WORDS)
    out.backward(p["grad"].double())
    return out.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 20, 21, 1000])
def test_chunks_of_any_size_equal_float64(dtype, chunk_tokens):
    p = make_problem(dtype)
    for got, exact in zip(chunked(p, chunk_tokens), float64_answer(p), strict=True):
        assert_near(got, exact, dtype)


def test_in_bfloat16_chunks_are_as_exact_as_whole_logits():
    """And the weight's gradient, summed in float32, more exact than a sum of rounded chunks."""
    p = make_problem(torch.bfloat16, tokens=512)
    hidden, weight = (p[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    whole = vocab_parallel_logprob(hidden @ weight.t(), p["target"], mask=p["mask"], vocab_size=WORDS)
    whole.backward(p["grad"])
    exact = float64_answer(p)
    ours = chunked(p, 8)
    for got, theirs, answer in zip(ours, (whole.detach(), hidden.grad, weight.grad), exact, strict=True):
        error, their_error = ((x.double() - answer).norm() for x in (got, theirs))
        assert error < 1.2 * their_error


def test_a_gradient_that_nobody_wants_is_not_made():
    p = make_problem()
    _, exact_hidden, exact_weight = float64_answer(p)
    for name, exact in (("hidden", exact_hidden), ("weight", exact_weight)):
        inputs = {**p, name: p[name].clone().requires_grad_()}
        out = linear_logprob(
            inputs["hidden"], inputs["weight"], p["target"], chunk_tokens=5, mask=p["mask"], vocab_size=WORDS
        )
        out.backward(p["grad"])
        assert_near(inputs[name].grad, exact, torch.float32)


def test_megatrons_main_grad_takes_the_gradient_in_float32():
    """As the hook of its DDP wants it: added to what is there, flag set, and a .grad of nothing but zeros."""
    p = make_problem(torch.bfloat16)
    weight = p["weight"].clone().requires_grad_()
    before = torch.randn(COLUMNS, HIDDEN)
    weight.main_grad, weight.grad_added_to_main_grad = before.clone(), False
    out = linear_logprob(p["hidden"], weight, p["target"], chunk_tokens=4, mask=p["mask"], vocab_size=WORDS)
    out.backward(p["grad"])
    assert weight.grad_added_to_main_grad
    assert not weight.grad.any()
    assert_near(weight.main_grad - before, float64_answer(p)[2], torch.bfloat16)


def loss_inputs(p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logprob = reference.logprob(p["hidden"] @ p["weight"].t(), p["target"], p["mask"], WORDS)
    behavior = (logprob + 0.1 * torch.randn(logprob.shape[0])).float()
    return p["target"], behavior, p["mask"], torch.tensor([0, 9, 9, 21])


KL = PearConfig(base_loss="kl", kl_weight=0.6, kl_tail="bucket", report_entropy=True)


@pytest.mark.parametrize("config", [*CONFIGS, KL], ids=config_id)
def test_pear_linear_loss_is_pear_loss_of_the_logits(config):
    p = make_problem()
    logprobs, ids = torch.randn(TOKENS, WORDS).log_softmax(-1).topk(5)
    inputs, reward, token_weights = loss_inputs(p), torch.tensor([1.0, 1.0, -0.5]), torch.randn(TOKENS)
    answers = []
    for chunk_tokens in (None, 4):
        hidden, weight = (p[name].clone().requires_grad_() for name in ("hidden", "weight"))
        common = {"reward": reward, "token_weights": token_weights, "vocab_size": WORDS}
        common["behavior_topk"] = (ids.int(), logprobs)
        if chunk_tokens is None:
            loss, num_tokens, report = pear_loss(hidden @ weight.t(), *inputs, config, **common)
        else:
            loss, num_tokens, report = pear_linear_loss(
                hidden, weight, *inputs, config, chunk_tokens=chunk_tokens, **common
            )
        loss.backward()
        answers.append((loss.detach(), num_tokens, report, hidden.grad, weight.grad))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)


def test_a_micro_batch_without_decisions_is_zero_and_not_nan():
    p = make_problem()
    p["mask"][:] = False
    hidden, weight = (p[name].clone().requires_grad_() for name in ("hidden", "weight"))
    target, _, mask, cu_seqlens = loss_inputs(p)
    behavior = torch.zeros(TOKENS)
    loss, num_tokens, report = pear_linear_loss(
        hidden, weight, target, behavior, mask, cu_seqlens, PearConfig(), chunk_tokens=4
    )
    loss.backward()
    assert loss == 0
    assert num_tokens == 0
    assert all(value.tolist() == [0.0, 0.0] for value in report.values())
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_no_tokens():
    hidden = torch.randn(0, HIDDEN, requires_grad=True)
    weight = torch.randn(COLUMNS, HIDDEN, requires_grad=True)
    out = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64), chunk_tokens=4)
    out.sum().backward()
    assert out.shape == (0,)
    assert not weight.grad.any()


def test_the_same_bits_run_after_run():
    p = make_problem(torch.bfloat16)
    first = chunked(p, 4)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, chunked(p, 4), strict=True))


def test_nothing_the_size_of_all_logits_is_allocated():
    tokens, chunk_tokens = 512, 16
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    target = torch.randint(4096, (tokens,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_logprob(hidden, weight, target, chunk_tokens=chunk_tokens).sum().backward()
    largest = max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest == chunk_tokens * 4096 * 4  # one chunk of logits: so the measurement sees the largest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(21, 11)}, r"\(21, 11\) and \(64, 12\)"),
        ({"hidden": torch.randn(3, 7, 12)}, r"hidden must be \[T, H\]"),
        ({"weight": torch.randn(64, 12).bfloat16()}, "hidden is torch.float32 and weight torch.bfloat16"),
        ({"target": torch.zeros(20, dtype=torch.int64)}, r"target has shape \(20,\)"),
        ({"mask": torch.ones(20, dtype=torch.bool)}, r"mask has shape \(20,\)"),
        ({"chunk_tokens": 0}, "chunk_tokens must be 1 or more, got 0"),
        ({"vocab_size": 65}, "vocab_size 65 does not fit"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    p = {k: v for k, v in make_problem().items() if k != "grad"}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**p, "chunk_tokens": 4, **change})


def chunked_shard(rank: int, problems: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    group = torch.distributed.group.WORLD
    return [
        chunked({**p, "weight": p["weight"].chunk(group.size())[rank]}, 4, tp_group=group) for p in problems
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_tensor_parallel_ranks_together_equal_float64(ranks):
    """The hidden states' gradient is whole on every rank, the weight's is the rank's rows."""
    problems = [make_problem(dtype) for dtype in TOLERANCE]
    by_rank = run_ranks(ranks, chunked_shard, problems)
    for p, *shards in zip(problems, *by_rank, strict=True):
        dtype = p["hidden"].dtype
        logprob, hidden_grad, weight_grad = float64_answer(p)
        for shard in shards:
            assert_near(shard[0], logprob, dtype)
            assert_near(shard[1], hidden_grad, dtype)
            assert torch.equal(shard[0], shards[0][0])
        assert_near(torch.cat([shard[2] for shard in shards]), weight_grad, dtype)
