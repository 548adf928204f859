"""vocab_parallel_logprob with the vocabulary split over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pear_megatron import vocab_parallel_logprob
from tests.distributed import run_ranks
from tests.ops.test_logprob import DTYPES, ROUNDING, assert_rounds_to, float64_answer
from tests.ops.test_statistics import TAILS, Problem, assert_close

COLUMNS, WORDS, TOKENS = 148, 70, 11  # with 2 ranks the second, with 4 the last two hold only padding


def whole_problem(dtype: torch.dtype, padded: bool) -> dict[str, Tensor | int | None]:
    logits = (3 * torch.randn(TOKENS, COLUMNS)).to(dtype)
    if padded:
        logits[:, WORDS:] = torch.tensor([float("nan"), float("inf"), 6e4]).repeat(26)
    target = torch.randint(WORDS if padded else COLUMNS, (TOKENS,))
    target[:2] = torch.tensor([0, (WORDS if padded else COLUMNS) - 1])
    mask = torch.rand(TOKENS) < 0.7
    target[~mask] = -100
    return {
        "logits": logits,
        "target": target,
        "mask": mask,
        "grad": torch.randn(TOKENS),
        "vocab_size": WORDS if padded else None,
    }


def shard_of(logits: Tensor, rank: int, ranks: int) -> Tensor:
    """This rank's columns, in memory of its own."""
    return logits.chunk(ranks, dim=-1)[rank].clone().requires_grad_()


def logprob_and_gradients(rank: int, problems: list[dict]) -> list[tuple[Tensor, Tensor, Tensor]]:
    group = torch.distributed.group.WORLD
    results = []
    for p in problems:
        gradients = []
        for inplace in (False, True):
            leaf = shard_of(p["logits"], rank, group.size())
            out = vocab_parallel_logprob(
                leaf * 1.0,
                p["target"],
                mask=p["mask"],
                tp_group=group,
                vocab_size=p["vocab_size"],
                inplace_backward=inplace,
            )
            out.backward(p["grad"])
            gradients.append(leaf.grad)
        results.append((out.detach(), *gradients))
    return results


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_equal_the_unsharded_float64_answer(ranks):
    problems = [whole_problem(dtype, padded) for dtype in DTYPES for padded in (False, True)]
    by_rank = run_ranks(ranks, logprob_and_gradients, problems)
    for p, *shards in zip(problems, *by_rank, strict=True):
        words = p["vocab_size"] or COLUMNS
        expected, exact = float64_answer(p["logits"][:, :words], p["target"], p["grad"], p["mask"])
        exact = torch.nn.functional.pad(exact, (0, COLUMNS - words))
        for logprob, _, _ in shards:
            assert torch.equal(logprob, shards[0][0])  # every rank has the same bits
        torch.testing.assert_close(shards[0][0].double(), expected, rtol=1e-5, atol=1e-5)
        gradient, inplace = (torch.cat([shard[i] for shard in shards], dim=-1) for i in (1, 2))
        assert_rounds_to(gradient, exact)
        assert torch.equal(gradient, inplace)


def collectives_of_a_step(rank: int, problem: dict) -> tuple[list[str], list[str]]:
    """Names of the collectives in forward and in backward, as torch's profiler sees them."""
    leaf = shard_of(problem["logits"], rank, 2)
    group = torch.distributed.group.WORLD
    with torch.profiler.profile() as forward:
        out = vocab_parallel_logprob(leaf, problem["target"], mask=problem["mask"], tp_group=group)
    with torch.profiler.profile() as backward:
        out.backward(problem["grad"])
    return tuple([e.name for e in p.events() if e.name.startswith("c10d::")] for p in (forward, backward))


def test_forward_has_one_collective_and_backward_none():
    for forward, backward in run_ranks(2, collectives_of_a_step, whole_problem(torch.float32, padded=False)):
        assert forward == ["c10d::_allgather_base_"]
        assert backward == []


def statistics_of_a_shard(rank: int, problems: list[tuple[Problem, int | None]]) -> list[tuple[Any, ...]]:
    group = torch.distributed.group.WORLD
    results = []
    for problem, vocab_size in problems:
        mine = replace(problem, logits=problem.logits.chunk(group.size(), dim=-1)[rank])
        for tail in TAILS:
            found, gradient = mine.ours(tail, vocab_size=vocab_size, tp_group=group)
            _, inplace = mine.ours(tail, vocab_size=vocab_size, tp_group=group, inplace_backward=True)
            results.append((*(x.detach() for x in found), gradient, inplace))
    return results


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_kl_and_entropy_of_ranks_together_equal_float64(ranks):
    problems: list[tuple[Problem, int | None]] = []
    for dtype in DTYPES:
        problems.append((Problem.random(TOKENS, COLUMNS, 9, dtype), None))
        padded = Problem.random(TOKENS, WORDS, 9, dtype)
        wide = torch.full((TOKENS, COLUMNS), float("nan"), dtype=dtype)
        wide[:, :WORDS] = padded.logits
        problems.append((replace(padded, logits=wide), WORDS))
    by_rank = run_ranks(ranks, statistics_of_a_shard, problems)
    expected = [problem.exact(tail, words) for problem, words in problems for tail in TAILS]
    for i, (exact, *shards) in enumerate(zip(expected, *by_rank, strict=True)):
        *values, gradient = exact
        for ours, value in zip(shards[0][:3], (values[0], values[1], values[2]), strict=True):
            torch.testing.assert_close(ours.double(), value, rtol=1e-5, atol=1e-5)
        for shard in shards:  # every rank has the same bits
            assert all(torch.equal(a, b) for a, b in zip(shard[:3], shards[0][:3], strict=True))
        whole, inplace = (torch.cat([shard[j] for shard in shards], dim=-1) for j in (3, 4))
        assert torch.equal(whole, inplace)
        assert_close(whole, gradient.nan_to_num(0.0), problems[i // 2][0].logits.dtype)


def collectives_of_a_kl_step(rank: int, problem: Problem) -> list[str]:
    group = torch.distributed.group.WORLD
    mine = replace(problem, logits=problem.logits.chunk(2, dim=-1)[rank])
    with torch.profiler.profile() as profile:
        mine.ours("bucket", tp_group=group)
    return [e.name for e in profile.events() if e.name.startswith("c10d::")]


def test_kl_and_entropy_take_no_collective_of_their_own():
    for names in run_ranks(2, collectives_of_a_kl_step, Problem.random(TOKENS, COLUMNS, 9)):
        assert names == ["c10d::_allgather_base_"]


def error_of_a_bad_target(rank: int, logits: Tensor, target: Tensor) -> str:
    with pytest.raises(IndexError) as caught:
        vocab_parallel_logprob(
            shard_of(logits, rank, 2), target, tp_group=torch.distributed.group.WORLD, vocab_size=WORDS
        )
    torch.distributed.barrier()  # and the group still works
    return str(caught.value)


def test_a_target_outside_the_vocabulary_raises_on_every_rank_and_none_hangs():
    target = torch.tensor([3, WORDS, 5])  # a padded column of the second rank
    for message in run_ranks(2, error_of_a_bad_target, torch.randn(3, COLUMNS), target):
        assert f"target {WORDS} at token 1 is outside the vocabulary of {WORDS}" in message


def both_losses(rank: int, problems: list[dict]) -> list[list[tuple[Tensor, Tensor]]]:
    """(values, gradient) of ours and of Megatron-Core's, for each problem."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()

    def value_and_gradient(loss: Callable[[Tensor], Tensor], p: dict) -> tuple[Tensor, Tensor]:
        leaf = shard_of(p["logits"], rank, 2)
        out = loss(leaf * 1.0)
        out.backward(p["grad"])
        return out.detach(), leaf.grad

    return [
        [
            value_and_gradient(lambda x, p=p: -vocab_parallel_logprob(x, p["target"], tp_group=group), p),
            value_and_gradient(lambda x, p=p: vocab_parallel_cross_entropy(x, p["target"]), p),
        ]
        for p in problems
    ]


def test_it_agrees_with_megatrons_vocab_parallel_cross_entropy():
    pytest.importorskip("megatron.core")
    problems = [whole_problem(dtype, padded=False) for dtype in (torch.float32, torch.bfloat16)]
    for p in problems:
        p["target"] = p["target"].clamp_min(0)
    for results in run_ranks(2, both_losses, problems):
        for (ours, our_grad), (theirs, their_grad) in results:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            rounding = 2 * ROUNDING[our_grad.dtype][0]
            torch.testing.assert_close(our_grad, their_grad, rtol=rounding, atol=1e-6)
