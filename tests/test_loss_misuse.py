"""Calls that would train on something else are errors that say so; what is off the mask changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pear_megatron import PearConfig, importance_weights, pear_loss
from pear_megatron.loss import loss_of_logprobs
from tests.distributed import run_ranks

B, S, V = 2, 6, 32
NAN, INF = float("nan"), float("inf")
TOKEN = PearConfig(variant="token")


class Call:
    """Two rows of one trajectory each, with a prompt of two tokens."""

    def __init__(self) -> None:
        self.logits, self.target = torch.randn(B, S, V), torch.randint(V, (B, S))
        self.behavior = -torch.rand(B, S) * 4 - 0.5
        self.mask = torch.zeros(B, S, dtype=torch.bool)
        self.mask[:, 2:] = True
        self.cu = torch.arange(0, B * S + 1, S)
        found = self.logits.log_softmax(-1).gather(-1, self.target[..., None])[..., 0]
        self.logprob = found  # [B, S], prompts too

    def loss(self, config: PearConfig = TOKEN, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return pear_loss(self.logits, self.target, self.behavior, self.mask, self.cu, config, **options)

    def of_logprobs(self, logprob: Tensor, config: PearConfig = TOKEN, **options: Any) -> Any:
        return loss_of_logprobs(logprob, self.behavior, self.mask, self.cu, config, **options)


def test_rows_that_run_into_each_other_are_refused() -> None:
    call = Call()
    call.cu = torch.tensor([0, B * S])
    with pytest.raises(ValueError, match=r"not at the beginnings of all 2 rows of 6 tokens"):
        call.loss()
    call.cu = torch.tensor([0, 4, S, 9, B * S])  # two trajectories in a row
    assert call.loss()[0].isfinite()


def test_megatrons_layout_is_refused() -> None:
    call = Call()
    for name in ("logits", "target", "behavior", "mask"):
        setattr(call, name, getattr(call, name).transpose(0, 1).contiguous())
    with pytest.raises(ValueError, match=r"\[S, B\] transposed"):
        call.loss()


@pytest.mark.parametrize("floor", [None, 0.5])
@pytest.mark.parametrize("bounds", [[0, S, B * S - 1], [0, S, S - 2, B * S]])
def test_boundaries_that_are_none_are_named(floor: float | None, bounds: list[int]) -> None:
    call = Call()
    call.cu = torch.tensor(bounds)
    reward = -torch.ones(len(bounds) - 1)
    with pytest.raises(ValueError, match="cu_seqlens"):
        call.loss(PearConfig(negative_floor=floor), reward=reward)


def test_no_rows_are_a_loss_of_zero() -> None:
    call = Call()
    call.cu = torch.tensor([0])
    for name in ("logits", "target", "behavior", "mask"):
        setattr(call, name, getattr(call, name)[:0])
    loss, tokens, _ = call.loss()
    assert (float(loss), int(tokens)) == (0.0, 0)


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_that_share_memory_get_gradients_of_their_own(inplace: bool) -> None:
    call, row = Call(), torch.randn(1, 1, V, requires_grad=True)
    call.logits = (2 * row).expand(B, S, V)
    call.loss(inplace_backward=inplace)[0].backward()
    found, row.grad = row.grad, None
    call.logits = (2 * row).repeat(B, S, 1)
    call.loss()[0].backward()
    torch.testing.assert_close(found, row.grad)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (TOKEN, {"token_weights": (torch.arange(B * S) != 3).float()}),
        (TOKEN, {"reward": torch.tensor([0.0, 1.0])}),
        (PearConfig(negative_floor=0.5), {"reward": torch.tensor([-1.0, 1.0])}),
        (PearConfig(variant="none", dft_power=1.0), {}),
    ],
    ids=["token weight", "reward", "stopped", "dft"],
)
def test_an_impossible_token_that_weighs_nothing_adds_nothing(config: PearConfig, options: Any) -> None:
    call = Call()
    call.logits[0, 3, call.target[0, 3]] = -INF
    call.logits.requires_grad_()
    loss, _, report = call.loss(config, **options)
    loss.backward()
    assert loss.isfinite()
    assert call.logits.grad is not None
    assert call.logits.grad.isfinite().all()
    assert report["nll"][0] == INF


def test_what_stands_off_the_mask_changes_nothing() -> None:
    call = Call()
    expected, _, report = call.loss()
    for logprob in (call.logprob, call.logprob.masked_fill(~call.mask, -INF), call.logprob.double()):
        loss, _, found = call.of_logprobs(logprob)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found["nll"], report["nll"])
    per_token = torch.full((B, S), NAN).masked_fill(call.mask, 1.0)
    torch.testing.assert_close(call.loss(reward=per_token)[0], expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: -x, "positive on a decision: give log p, not -log p"),
        (lambda x: x.bfloat16(), "logprob are bfloat16, which is too coarse"),
        (lambda x: x.T, r"logprob has shape \(6, 2\) and mask \(2, 6\)"),
    ],
)
def test_log_probs_that_are_none_or_lie_otherwise_are_refused(change: Any, said: str) -> None:
    call = Call()
    with pytest.raises(ValueError, match=said):
        call.of_logprobs(change(call.logprob))
    with pytest.raises(ValueError, match="too coarse"):
        importance_weights(
            call.logprob.flatten().half(), call.behavior.flatten(), call.mask.flatten(), call.cu, TOKEN
        )


def test_entropy_and_kl_are_given_where_the_config_asks_for_them() -> None:
    call, ones = Call(), torch.ones(B, S)
    with pytest.raises(ValueError, match="report_entropy or entropy_power needs entropy"):
        call.of_logprobs(call.logprob, PearConfig(report_entropy=True))
    with pytest.raises(ValueError, match="base_loss 'kl' needs kl"):
        call.of_logprobs(call.logprob, PearConfig(base_loss="kl"))
    with pytest.raises(ValueError, match="kl is given and the config does not ask for it"):
        call.of_logprobs(call.logprob, kl=ones)
    with pytest.raises(ValueError, match=r"entropy has shape \(6, 2\)"):
        call.of_logprobs(call.logprob, PearConfig(report_entropy=True), entropy=ones.T)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (torch.tensor([1.0, NAN]), "reward: not finite on a decision"),
        (torch.tensor([1.0, INF]), "reward: not finite on a decision"),
        (torch.ones(S, B), r"reward has shape \(6, 2\) and mask \(2, 6\)"),
    ],
)
def test_rewards_that_are_none_are_refused(reward: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Call().loss(reward=reward)


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        ([0, 1], TypeError, "source must be a tensor"),
        (torch.tensor([0]), ValueError, r"source has shape \(1,\); give one per trajectory \(2\)"),
        (torch.tensor([0.0, 1.0]), ValueError, "source is torch.float32; give the number of each"),
        (torch.tensor([1, 2]), ValueError, "source: no number from 0 to num_sources - 1 = 1"),
    ],
)
def test_sources_that_are_none_are_refused(source: Any, kind: type[Exception], said: str) -> None:
    call = Call()
    call.target[0, 2] = -1  # an error too, which is found with the log-probs, after these
    with pytest.raises(kind, match=said):
        call.loss(source=source, num_sources=2)


def test_a_word_for_no_log_probability_is_no_log_probability() -> None:
    call = Call()
    call.behavior[1, 4] = -9999.0
    with pytest.raises(ValueError, match="-9999, which engines write where they have no log-probability"):
        call.loss()
    call.behavior[1, 4], call.mask[1, 4] = -9999.0, False
    assert call.loss()[0].isfinite()


def test_a_top_k_of_lists_is_named() -> None:
    with pytest.raises(TypeError, match=r"behavior_topk\[0\] must be a tensor"):
        Call().loss(PearConfig(base_loss="kl"), behavior_topk=([[1]], [[0.1]]))


def test_the_default_dtype_has_no_say() -> None:
    call = Call()
    call.mask[:, 5] = False
    expected = call.loss(normalization="trajectory")[0]
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = call.loss(normalization="trajectory")[0]
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, expected)


def test_a_copy_of_a_config_is_validated() -> None:
    assert TOKEN.model_copy(update={"gamma": "0.5"}).gamma == 0.5
    for update in ({"gama": 0.5}, {"variant": "tokn"}, {"gamma": 2.0}):
        with pytest.raises(ValueError, match=r"gama|variant|gamma"):
            TOKEN.model_copy(update=update)


def unsharded(rank: int) -> str:
    logits = torch.randn(4, 1000)
    with pytest.raises(ValueError, match="each of the 2 ranks has all 1000 tokens"):
        pear_loss(
            logits, torch.zeros(4, dtype=torch.long), -torch.ones(4), torch.ones(4, dtype=torch.bool),
            torch.tensor([0, 4]), TOKEN, tp_group=torch.distributed.group.WORLD, vocab_size=1000,
        )  # fmt: skip
    return "refused"


def test_logits_that_every_rank_has_whole_are_refused() -> None:
    assert run_ranks(2, unsharded) == ["refused", "refused"]
