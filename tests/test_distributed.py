"""The harness of the other tests: a failure on any rank must fail the test, and fast."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.distributed import run_ranks


def _sum_of_ranks(rank: int, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    x = x + rank
    torch.distributed.all_reduce(x)
    return rank, x


def _one_rank_raises(rank: int) -> None:
    if rank == 1:
        raise KeyError("only here")
    torch.distributed.barrier()


def _one_rank_dies(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    torch.distributed.barrier()


def _never_returns(rank: int) -> None:
    time.sleep(60)


def test_every_rank_returns_its_result():
    results = run_ranks(3, _sum_of_ranks, torch.zeros(2))
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(torch.equal(x, torch.full((2,), 3.0)) for _, x in results)


def test_an_exception_on_one_rank_is_raised_here_with_its_traceback():
    with pytest.raises(KeyError, match="only here") as caught:
        run_ranks(2, _one_rank_raises)
    assert "rank 1 of 2" in caught.value.__notes__[0]
    assert "_one_rank_raises" in caught.value.__notes__[0]


def test_a_rank_that_dies_fails_the_test():
    with pytest.raises(RuntimeError, match="rank 1 died with exit code 7"):
        run_ranks(2, _one_rank_dies)


def test_ranks_that_hang_are_stopped():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not finish"):
        run_ranks(2, _never_returns, timeout=3)
