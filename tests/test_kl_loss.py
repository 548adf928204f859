"""pear_loss with a KL from a stored top-k and with entropies: against float64, packed, over ranks, and its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pear_megatron import PearConfig, pear_loss
from pear_megatron.loss import BY_SOURCE, loss_of_logprobs, report_keys
from pear_megatron.ops import reference
from tests.distributed import run_ranks, zigzag
from tests.test_loss import Batch, assert_shards_equal_one, make_batch

CONFIGS = [
    PearConfig(base_loss="kl"),
    PearConfig(base_loss="kl", kl_tail="bucket", variant="block", negative_scale=0.3),
    PearConfig(base_loss="kl", kl_weight=0.3, report_entropy=True, variant="sequence"),
    PearConfig(base_loss="kl", kl_weight=0.7, kl_tail="bucket", variant="none", report_entropy=True),
    PearConfig(report_entropy=True, normalize="sequence"),
]


def config_id(config: PearConfig) -> str:
    return f"{config.base_loss}-{config.kl_weight}-{config.kl_tail}-{config.variant}"


@dataclass
class KlBatch:
    batch: Batch
    ids: Tensor  # [T, k]
    logprobs: Tensor

    @classmethod
    def random(cls, lengths: list[int], k: int = 5) -> KlBatch:
        batch = make_batch(lengths)
        behavior = (batch.logits + 0.5 * torch.randn(batch.logits.shape)).log_softmax(-1)
        logprobs, ids = behavior.topk(k)
        ids[~batch.mask] = 999  # anything
        return cls(batch, ids.int(), logprobs)

    def options(self) -> dict[str, Any]:
        return {"reward": self.batch.reward, "token_weights": self.batch.token_weights}

    def exact(self, config: PearConfig, **options: Any) -> tuple[Tensor, Tensor]:
        logits = self.batch.logits.double().requires_grad_()
        topk = (self.ids, self.logprobs)
        loss = reference.loss_sum(
            logits, *self.batch.inputs()[1:], config, behavior_topk=topk, **self.options(), **options
        )
        loss.backward()
        return loss.detach(), logits.grad

    def ours(self, config: PearConfig, **options: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        leaf = self.batch.logits.detach().clone().requires_grad_()
        loss, num_tokens, report = pear_loss(
            leaf * 1.0,
            *self.batch.inputs()[1:],
            config,
            behavior_topk=(self.ids, self.logprobs),
            **{**self.options(), **options},
        )
        loss.backward()
        return loss.detach(), leaf.grad, num_tokens, report


@pytest.mark.parametrize("normalization", ["token", "trajectory"])
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_value_and_gradient_equal_float64_autograd(config, normalization):
    kl_batch = KlBatch.random([12, 1, 20, 0, 9])
    expected, exact = kl_batch.exact(config, normalization=normalization)
    for inplace in (False, True):
        loss, grad, _, _ = kl_batch.ours(config, normalization=normalization, inplace_backward=inplace)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_the_report_has_the_means_that_the_config_has(config):
    kl_batch = KlBatch.random([12, 7, 20])
    batch, source = kl_batch.batch, torch.tensor([1, 0, 1])
    loss, *_, report = kl_batch.ours(config, source=source, num_sources=2)
    assert tuple(report) == (*report_keys(config), BY_SOURCE)
    exact = {"pear/entropy": reference.entropy(batch.logits, batch.mask)}
    if config.base_loss == "kl":
        topk = (kl_batch.ids, kl_batch.logprobs)
        exact["kl"] = reference.topk_kl(batch.logits, *topk, batch.mask, config.kl_tail)
    of_token = source.repeat_interleave(batch.cu_seqlens.diff())
    for name in set(exact) & set(report):
        torch.testing.assert_close(report[name][0].double(), exact[name].sum(), rtol=1e-5, atol=1e-5)
        assert report[name][1] == batch.mask.sum()
        row = report_keys(config).index(name)
        for s in range(2):
            total, count = report[BY_SOURCE][s, row].double()
            torch.testing.assert_close(total, exact[name][of_token == s].sum(), rtol=1e-5, atol=1e-5)
            assert count == (batch.mask & (of_token == s)).sum()
    assert ("pear/entropy" in report) == config.report_entropy
    torch.testing.assert_close(report["loss"][0], loss)


def test_an_entropy_that_is_reported_changes_no_bit():
    kl_batch = KlBatch.random([12, 9])
    plain, watched = (kl_batch.ours(PearConfig(report_entropy=report)) for report in (False, True))
    assert torch.equal(plain[0], watched[0])
    assert torch.equal(plain[1], watched[1])


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_packed_equals_one_by_one(config):
    lengths = [12, 7, 20]
    kl_batch = KlBatch.random(lengths)
    loss, grad, num_tokens, _ = kl_batch.ours(config)
    total, rows, start = torch.zeros(()), [], 0
    counted = 0
    for i, length in enumerate(lengths):
        here = slice(start, start + length)
        batch = kl_batch.batch
        of_tokens = (getattr(batch, name)[here] for name in ("logits", "target", "behavior_logprobs", "mask"))
        alone = Batch(
            *of_tokens, torch.tensor([0, length]), batch.reward[i : i + 1], batch.token_weights[here]
        )
        one = KlBatch(alone, kl_batch.ids[here], kl_batch.logprobs[here]).ours(config)
        total, counted = total + one[0], counted + int(one[2])
        rows.append(one[1])
        start += length
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, torch.cat(rows), rtol=1e-5, atol=1e-6)
    assert num_tokens == counted


def test_rows_and_flat_tokens_are_alike():
    kl_batch = KlBatch.random([10, 10])
    flat = kl_batch.ours(CONFIGS[1])
    batch = kl_batch.batch
    logits = batch.logits.view(2, 10, -1).requires_grad_()
    loss, *_ = pear_loss(
        logits,
        batch.target.view(2, 10),
        batch.behavior_logprobs,
        batch.mask.view(2, 10),
        batch.cu_seqlens,
        CONFIGS[1],
        behavior_topk=(kl_batch.ids.view(2, 10, -1), kl_batch.logprobs.view(2, 10, -1)),
        **kl_batch.options(),
    )
    loss.backward()
    assert torch.equal(loss, flat[0])
    assert torch.equal(logits.grad.flatten(0, 1), flat[1])


def test_the_top_k_of_transposed_rows_is_refused():
    kl_batch = KlBatch.random([10, 10])
    batch = kl_batch.batch
    logits, *rows = (x.unflatten(0, (2, 10)) for x in batch.inputs()[:4])
    topk = tuple(x.unflatten(0, (2, 10)).transpose(0, 1) for x in (kl_batch.ids, kl_batch.logprobs))
    with pytest.raises(
        ValueError, match=r"topk_ids has shape \(10, 2, 5\); .* target, which has shape \(2, 10\)"
    ):
        pear_loss(logits, *rows, batch.cu_seqlens, CONFIGS[1], behavior_topk=topk)


def test_a_top_k_of_more_than_everything_is_refused_on_a_cpu():
    given = KlBatch.random([6, 5])
    token = given.batch.mask.nonzero()[1].item()
    heavy, whole = given.logprobs.clone(), given.ids.clone()
    heavy[token], whole[token] = -0.1, torch.arange(given.ids.shape[-1])
    with pytest.raises(
        ValueError, match=f"behavior_topk at token {token}: its probabilities add up to 4.52419"
    ):
        KlBatch(given.batch, whole, heavy).ours(CONFIGS[1])
    whole[token, 1:] = -1  # no entries
    KlBatch(given.batch, whole, heavy).ours(CONFIGS[1])


def test_a_kl_without_what_it_needs_is_refused():
    kl_batch = KlBatch.random([12, 9])
    batch, config = kl_batch.batch, CONFIGS[0]
    with pytest.raises(ValueError, match="base_loss 'kl' needs behavior_topk"):
        pear_loss(*batch.inputs(), config)
    with pytest.raises(ValueError, match="base_loss 'kl' needs kl"):
        loss_of_logprobs(-torch.rand(21), *batch.inputs()[2:], config)


def test_a_micro_batch_without_decisions_is_zero_and_not_nan():
    kl_batch = KlBatch.random([12, 9])
    kl_batch.batch.mask[:] = False
    kl_batch.batch.behavior_logprobs[:] = 0.0
    for config in CONFIGS:
        loss, grad, num_tokens, report = kl_batch.ours(config)
        assert loss == 0
        assert num_tokens == 0
        assert not grad.any()
        assert all(value.tolist() == [0.0, 0.0] for value in report.values())


def loss_of_a_shard(rank: int, kl_batch: KlBatch, tp: int) -> list[tuple[Tensor, Tensor, Tensor, dict]]:
    """Ranks tp-first, as Megatron orders them: rank = cp_rank * tp + tp_rank."""
    ranks = torch.distributed.get_world_size()
    cp = ranks // tp
    tp_groups = [torch.distributed.new_group(list(range(i * tp, (i + 1) * tp))) for i in range(cp)]
    cp_groups = [torch.distributed.new_group(list(range(i, ranks, tp))) for i in range(tp)]
    cp_rank, tp_rank = divmod(rank, tp)
    batch = kl_batch.batch
    whole = (*batch.inputs()[:4], batch.token_weights, kl_batch.ids, kl_batch.logprobs)
    logits, *of_tokens, factors, ids, logprobs = (zigzag(x, batch.cu_seqlens, cp_rank, cp) for x in whole)
    shard = Batch(logits.chunk(tp, -1)[tp_rank], *of_tokens, batch.cu_seqlens, batch.reward, factors)
    groups = {"tp_group": tp_groups[cp_rank], "cp_group": cp_groups[tp_rank]}
    return [KlBatch(shard, ids, logprobs).ours(config, **groups) for config in CONFIGS]


@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (1, 2), (2, 2)])
def test_tensor_and_context_parallel_ranks_together_equal_one(tp, cp):
    kl_batch = KlBatch.random([12, 8, 0, 24])
    by_rank = run_ranks(tp * cp, loss_of_a_shard, kl_batch, tp)
    for i, config in enumerate(CONFIGS):
        own = [results[i] for results in by_rank]
        assert_shards_equal_one(own, kl_batch.ours(config), tp, kl_batch.batch.cu_seqlens, atol=2e-6)
