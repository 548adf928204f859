"""pear_loss: value, gradient, reward, report; packed, batched, and over tensor and context parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pear_megatron import PearConfig, importance_weights, pear_loss
from pear_megatron.loss import BY_SOURCE, REPORT_KEYS, loss_of_logprobs, report_keys
from pear_megatron.ops import STATISTICS, reference
from tests.distributed import run_ranks, zigzag
from tests.packs import CONFIGS, VARIANTS, config_id

WORDS = 60
NAN = float("nan")


@dataclass
class Batch:
    logits: Tensor  # [T, V]
    target: Tensor
    behavior_logprobs: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    reward: Tensor  # [S]
    token_weights: Tensor  # [T]
    reference_logprobs: Tensor | None = None  # [T]

    def inputs(self) -> tuple[Tensor, ...]:
        return self.logits, self.target, self.behavior_logprobs, self.mask, self.cu_seqlens


def make_batch(lengths: list[int], dtype: torch.dtype = torch.float32) -> Batch:
    tokens = sum(lengths)
    logits = torch.randn(tokens, WORDS).to(dtype)
    target = torch.randint(WORDS, (tokens,))
    mask = torch.rand(tokens) < 0.7
    logprob = reference.logprob(logits, target).float()
    target[~mask] = -100
    return Batch(
        logits=logits,
        target=target,
        behavior_logprobs=logprob + 0.2 * torch.randn(tokens),
        mask=mask,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        reward=torch.tensor([1.0, -0.5, 2.0, 0.0, -1.0])[: len(lengths)],
        token_weights=torch.randn(tokens).where(mask, NAN),
    )


def loss_and_gradient(batch: Batch, config: PearConfig, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, dict]:
    leaf = batch.logits.detach().clone().requires_grad_()
    loss, num_tokens, report = pear_loss(leaf * 1.0, *batch.inputs()[1:], config, **kwargs)
    loss.backward()
    return loss.detach(), leaf.grad, num_tokens, report


def float64_answer(
    batch: Batch, config: PearConfig, reward: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    exact = batch.logits.double().requires_grad_()
    loss = reference.loss_sum(exact, *batch.inputs()[1:], config, reward, **options)
    loss.backward()
    return loss.detach(), exact.grad


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
@pytest.mark.parametrize("factors", [(), ("reward",), ("token_weights",), ("reward", "token_weights")])
def test_value_and_gradient_equal_float64_autograd(config, factors):
    config = PearConfig(**{**config.model_dump(), "negative_scale": 0.3})
    batch = make_batch([12, 1, 20, 0, 9])
    given = {"reward": None, "token_weights": None} | {name: getattr(batch, name) for name in factors}
    expected, exact = float64_answer(batch, config, **given)
    for inplace in (False, True):
        loss, grad, _, _ = loss_and_gradient(batch, config, **given, inplace_backward=inplace)
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)


# Settings of factors and reference ratios; each needs reference_logprobs.
NEIGHBOURS = {
    "dft": PearConfig(dft_power=1.0, dft_floor=0.01),
    "prift": PearConfig(variant="none", dft_power=0.5, dft_policy="reference"),
    "own": PearConfig(variant="own", ratio="reference", log_ratio_clip=(-1.0, 0.5)),
    "iw_sft": PearConfig(variant="sequence", ratio="reference", sequence_scale="mean", tau=5.0),
    "stopped": PearConfig(variant="block", negative_floor=0.2, negative_scale=0.0, normalize="sequence"),
    "plain_stopped": PearConfig(variant="none", negative_floor=0.2, dft_power=0.5),
}


def with_reference(batch: Batch) -> Batch:
    batch.reference_logprobs = (batch.behavior_logprobs + 0.4 * torch.randn(len(batch.mask))).clamp_max(0.0)
    return batch


@pytest.mark.parametrize("normalization", ["token", "trajectory"])
@pytest.mark.parametrize("config", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_of_pear_equal_float64_autograd(config, normalization):
    batch = with_reference(make_batch([12, 1, 20, 0, 9]))
    given = {
        "reward": batch.reward,
        "reference_logprobs": batch.reference_logprobs,
        "normalization": normalization,
    }
    expected, exact = float64_answer(batch, config, **given)
    loss, grad, _, _ = loss_and_gradient(batch, config, **given)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences_at_constant_weights():
    """And factors are constants: the gradient of a weight would show."""
    batch = with_reference(make_batch([5, 4]))
    batch.behavior_logprobs = batch.behavior_logprobs.clamp_max(0.0)
    config = PearConfig(variant="none", dft_power=1.0, negative_floor=0.1)
    given = {"reward": batch.reward, "reference_logprobs": batch.reference_logprobs}
    _, grad, _, _ = loss_and_gradient(batch, config, **given)
    logprob = reference.logprob(batch.logits, batch.target, batch.mask)
    per_token = batch.reward.repeat_interleave(batch.cu_seqlens.diff())
    factor = reference.weight_factor(
        logprob, batch.behavior_logprobs, config, per_token, None, batch.reference_logprobs
    )
    assert 0 < (factor[batch.mask] == 0).sum() < batch.mask.sum()

    def value(logits: Tensor) -> Tensor:
        return -(per_token * factor * reference.logprob(logits, batch.target, batch.mask)).sum()

    exact, step = batch.logits.double(), 1e-6
    for t, v in ((0, 0), (3, 7), (6, 11), (8, int(batch.target[8].clamp_min(0)))):
        up, down = exact.clone(), exact.clone()
        up[t, v] += step
        down[t, v] -= step
        slope = (value(up) - value(down)) / (2 * step)
        torch.testing.assert_close(grad[t, v].double(), slope, rtol=1e-4, atol=1e-6)


def test_entropies_weigh_and_are_reported():
    batch = make_batch([12, 9])
    entropy = reference.entropy(batch.logits, batch.mask)
    config = PearConfig(entropy_power=1.5)
    logprob = reference.logprob(batch.logits, batch.target, batch.mask).float().requires_grad_()
    inputs = (batch.behavior_logprobs, batch.mask, batch.cu_seqlens)
    loss, num_tokens, report = loss_of_logprobs(logprob, *inputs, config, entropy=entropy.float())
    loss.backward()
    expected = reference.loss_sum(batch.logits, batch.target, *inputs[:2], batch.cu_seqlens, config)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-5)
    assert set(report) == set(report_keys(config))
    torch.testing.assert_close(report["pear/entropy"], torch.stack([entropy.sum().float(), num_tokens]))


@pytest.mark.parametrize("policy", ["target", "reference"])
def test_beside_a_kl_dfts_factor_is_of_the_nll_alone(policy):
    batch = with_reference(make_batch([12, 9]))
    config = PearConfig(base_loss="kl", kl_weight=0.25, dft_power=1.0, dft_policy=policy)
    logprob = reference.logprob(batch.logits, batch.target, batch.mask).float().requires_grad_()
    kl = torch.rand(21).where(batch.mask, 0.0).requires_grad_()
    inputs = (batch.behavior_logprobs, batch.mask, batch.cu_seqlens)
    given = {"kl": kl, "reference_logprobs": batch.reference_logprobs.where(batch.mask, NAN)}
    loss, _, _ = loss_of_logprobs(logprob, *inputs, config, **given)
    loss.backward()
    weights, _ = reference.weights(logprob.detach(), *inputs, config)
    factor = reference.dft_factor(logprob, config, batch.reference_logprobs)
    expected = weights * (0.75 * factor * -logprob.detach() + 0.25 * kl.detach())
    torch.testing.assert_close(loss.detach().double(), expected[batch.mask].sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl.grad.double(), 0.25 * weights, rtol=1e-5, atol=1e-7)
    slope = (-0.75 * weights * factor).where(batch.mask, 0.0)
    torch.testing.assert_close(logprob.grad.double(), slope, rtol=1e-5, atol=1e-7)


def test_negatives_that_have_stopped_push_nothing_and_are_reported_whatever_their_scale():
    batch = make_batch([12, 9])
    batch.mask[:], batch.target = True, batch.target.clamp_min(0)
    logprob = reference.logprob(batch.logits, batch.target).float()
    batch.behavior_logprobs = (logprob + torch.linspace(-5, 3, 21)).clamp_max(0.0)
    stopped = logprob < batch.behavior_logprobs - 1.0
    stopped[:12] = False  # a positive example
    for scale in (1.0, 0.0):
        config = PearConfig(variant="none", negative_floor=1.0, negative_scale=scale)
        _, grad, _, report = loss_and_gradient(batch, config, reward=torch.tensor([1.0, -1.0]))
        assert not grad[stopped].any()
        assert grad[~stopped][12:].any(dim=1).all() == (scale > 0)
        assert 0 < stopped.sum() < 9
        assert report["pear/negative_stopped"].tolist() == [float(stopped.sum()), 9.0]


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_normalised_by_trajectory_it_equals_float64_autograd(config):
    batch = make_batch([12, 1, 20, 0, 9])
    batch.mask[12:13] = False  # a trajectory without decisions counts nothing
    batch.mask[0] = batch.mask[20] = batch.mask[40] = True
    batch.target.clamp_min_(0)
    given = {"reward": batch.reward, "token_weights": batch.token_weights, "normalization": "trajectory"}
    batch.token_weights.nan_to_num_(1.0)
    expected, exact = float64_answer(batch, config, **given)
    loss, grad, num_tokens, report = loss_and_gradient(batch, config, **given)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)
    assert num_tokens == report["loss"][1] == 3
    assert num_tokens.dtype == torch.int32
    assert report["nll"][1] == batch.mask.sum()


def test_each_trajectory_counts_once_however_long_it_is():
    """Mean over trajectories of the mean over decisions, by hand."""
    batch = make_batch([4, 30])
    batch.mask[:] = True
    batch.target.clamp_min_(0)
    loss, *_ = loss_and_gradient(batch, PearConfig(variant="none"), normalization="trajectory")
    nll = torch.nn.functional.cross_entropy(batch.logits, batch.target, reduction="none")
    torch.testing.assert_close(loss, nll[:4].mean() + nll[4:].mean())


@pytest.mark.parametrize("normalization", ["token", "trajectory"])
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_the_report_of_a_source_is_that_of_its_trajectories_alone(config, normalization):
    batch = make_batch([12, 7, 20, 5, 9])
    source = torch.tensor([2, 0, 2, 0, 0])
    options = {"reward": batch.reward, "token_weights": batch.token_weights, "normalization": normalization}
    plain = loss_and_gradient(batch, config, **options)
    loss, grad, _, report = loss_and_gradient(batch, config, **options, source=source, num_sources=3)
    assert torch.equal(loss, plain[0])  # looking changes nothing
    assert torch.equal(grad, plain[1])
    by_source = report[BY_SOURCE]
    assert by_source.shape == (3, len(REPORT_KEYS), 2)
    assert not by_source[1].any()
    for s in (0, 2):
        alone = make_batch([1])
        alone.__dict__ |= batch.__dict__
        alone.mask = batch.mask & (source == s).repeat_interleave(batch.cu_seqlens.diff())
        expected = loss_and_gradient(alone, config, **options)[3]
        for key, value in zip(REPORT_KEYS, by_source[s], strict=True):
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5, msg=key)
    for key, value in zip(REPORT_KEYS, by_source.sum(0), strict=True):
        torch.testing.assert_close(value, report[key], rtol=1e-5, atol=1e-5, msg=key)


def test_bf16_logits_lose_only_the_rounding_of_the_gradient():
    batch = make_batch([12, 9], torch.bfloat16)
    expected, exact = float64_answer(batch, PearConfig(), None)
    loss, grad, _, _ = loss_and_gradient(batch, PearConfig())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), exact, rtol=1.02 * 2**-8, atol=1e-9)


def test_padded_vocabulary_stays_out_of_the_loss():
    batch = make_batch([12, 9])
    expected, exact = float64_answer(batch, PearConfig(), batch.reward)
    batch.logits = torch.cat([batch.logits, torch.full((21, 4), float("nan"))], dim=1)
    loss, grad, _, _ = loss_and_gradient(batch, PearConfig(), reward=batch.reward, vocab_size=WORDS)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[:, :WORDS].double(), exact, rtol=1e-5, atol=1e-6)
    assert not grad[:, WORDS:].any()


def test_a_reward_for_every_token():
    batch = make_batch([12, 9])
    config, reward = PearConfig(negative_scale=0.5), torch.randn(21)
    loss, _, _, _ = loss_and_gradient(batch, config, reward=reward)
    logprob = reference.logprob(batch.logits, batch.target, batch.mask)
    weights, _ = reference.weights(logprob, *batch.inputs()[2:], config)
    scaled = torch.where(reward < 0, 0.5 * reward, reward).double()
    torch.testing.assert_close(loss.double(), -(scaled * weights * logprob).sum(), rtol=1e-5, atol=1e-5)

    per_trajectory = loss_and_gradient(batch, config, reward=batch.reward)
    per_token = loss_and_gradient(batch, config, reward=batch.reward.repeat_interleave(torch.tensor([12, 9])))
    assert torch.equal(per_token[0], per_trajectory[0])
    assert torch.equal(per_token[1], per_trajectory[1])


def test_a_negative_example_is_pushed_away():
    batch = make_batch([6])
    batch.mask[:] = True
    batch.target = batch.target.clamp_min(0)
    _, grad, _, _ = loss_and_gradient(batch, PearConfig(), reward=torch.tensor([-1.0]))
    assert (grad[range(6), batch.target] > 0).all()  # a descent step lowers the token's logit
    for scale, expected in ((0.0, 0.0), (0.5, 0.5)):
        config = PearConfig(negative_scale=scale)
        _, scaled, _, _ = loss_and_gradient(batch, config, reward=torch.tensor([-1.0]))
        torch.testing.assert_close(scaled, expected * grad)


def test_token_weights_change_the_gradient_and_neither_the_count_nor_the_weights():
    batch = make_batch([12, 9])
    config = PearConfig(negative_scale=0.0)
    plain = loss_and_gradient(batch, config)
    for factor in (1.0, -2.0):  # negative_scale looks at rewards alone
        batch.token_weights.fill_(factor)
        loss, grad, num_tokens, report = loss_and_gradient(batch, config, token_weights=batch.token_weights)
        assert torch.equal(loss, factor * plain[0])
        assert torch.equal(grad, factor * plain[1])
        assert torch.equal(num_tokens, plain[2])
        assert torch.equal(report["loss"], torch.tensor([loss, float(num_tokens)]))
        assert all(torch.equal(report[name], plain[3][name]) for name in report if name != "loss")


@pytest.mark.parametrize("name", ["token_weights", "reward"])
def test_factors_that_want_a_gradient_are_refused(name):
    batch = make_batch([12, 9])
    factor = getattr(batch, name).nan_to_num(1.0).requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require a gradient.*give {name}.detach"):
        loss_and_gradient(batch, PearConfig(), **{name: factor})


def test_a_token_weight_of_zero_takes_a_decision_out_of_the_gradient_alone():
    batch = make_batch([12])
    batch.mask[:] = True
    batch.target = batch.target.clamp_min(0)
    batch.token_weights = torch.tensor([1.0] * 5 + [0.0] + [1.0] * 6).bfloat16()
    _, plain, _, _ = loss_and_gradient(batch, PearConfig())
    _, grad, _, _ = loss_and_gradient(batch, PearConfig(), token_weights=batch.token_weights)
    assert not grad[5].any()
    others = [t for t in range(12) if t != 5]
    assert torch.equal(grad[others], plain[others])


def test_token_weights_that_are_not_finite_on_a_decision_are_refused():
    batch = make_batch([12, 9])
    batch.mask[:5] = torch.tensor([True, False, True, False, True])
    batch.target = batch.target.clamp_min(0)
    batch.token_weights[[0, 1, 2, 4]] = torch.tensor([1.0, NAN, float("inf"), NAN])
    message = f"not finite on 2 of {batch.mask.sum()} decisions, first at flat position 2: inf; give a finite number"
    with pytest.raises(ValueError, match=message):
        loss_and_gradient(batch, PearConfig(), token_weights=batch.token_weights)


@pytest.mark.parametrize("with_behavior", [True, False])
def test_variant_none_is_torchs_cross_entropy(with_behavior):
    batch = make_batch([12, 9])
    if not with_behavior:
        batch.behavior_logprobs = None
    loss, grad, num_tokens, report = loss_and_gradient(batch, PearConfig(variant="none"))
    leaf = batch.logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, batch.target, ignore_index=-100, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-6)
    assert report["pear/weight"].tolist() == [float(num_tokens)] * 2


def test_weights_are_constants_of_the_gradient():
    batch = make_batch([15])
    config = PearConfig()
    _, grad, _, _ = loss_and_gradient(batch, config)
    logprob = reference.logprob(batch.logits, batch.target, batch.mask).float()
    weights, _ = importance_weights(logprob, *batch.inputs()[2:], config)
    leaf = batch.logits.clone().requires_grad_()
    nll = torch.nn.functional.cross_entropy(leaf, batch.target, ignore_index=-100, reduction="none")
    (weights * nll).sum().backward()
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_packed_equals_unpacked(config):
    lengths = [12, 1, 20, 0, 9]
    batch = make_batch(lengths)
    loss, grad, num_tokens, report = loss_and_gradient(batch, config, reward=batch.reward)
    alone = []
    for i, (start, length) in enumerate(zip(batch.cu_seqlens.tolist(), lengths, strict=False)):
        one = slice(start, start + length)
        part = Batch(
            *(x[one] for x in batch.inputs()[:4]),
            torch.tensor([0, length]),
            batch.reward[i : i + 1],
            batch.token_weights[one],
        )
        alone.append(loss_and_gradient(part, config, reward=part.reward))
    torch.testing.assert_close(sum(part[0] for part in alone), loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([part[1] for part in alone]), grad)
    assert sum(part[2] for part in alone) == num_tokens
    for name, value in report.items():
        torch.testing.assert_close(sum(part[3][name] for part in alone), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["b_s_v", "s_b_v"])
def test_a_batch_of_rows_is_a_pack_of_equal_lengths(transposed):
    batch = make_batch([10, 10, 10])
    flat = loss_and_gradient(batch, PearConfig(), reward=batch.reward, token_weights=batch.token_weights)
    logits = batch.logits.view(3, 10, WORDS)
    if transposed:  # as Megatron's model gives them: [s, b, v], seen as [b, s, v]
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    leaf = logits.requires_grad_()
    *tensors, factors = (x.view(3, 10) for x in (*batch.inputs()[1:4], batch.token_weights))
    loss, num_tokens, report = pear_loss(
        leaf, *tensors, batch.cu_seqlens, PearConfig(), reward=batch.reward, token_weights=factors
    )
    loss.backward()
    assert torch.equal(loss, flat[0])
    assert torch.equal(leaf.grad.reshape(30, WORDS), flat[1])
    assert torch.equal(num_tokens, flat[2])
    assert all(torch.equal(report[name], flat[3][name]) for name in report)


@pytest.mark.parametrize("name", ["behavior_logprobs", "reference_logprobs"])
def test_logprobs_of_transposed_rows_are_refused(name):
    batch = make_batch([10, 10, 10])
    logits, *rows = (x.unflatten(0, (3, 10)) for x in batch.inputs()[:4])
    inputs = dict(zip(("target", "behavior_logprobs", "mask"), rows, strict=True))
    inputs[name] = inputs["behavior_logprobs"].T  # [s, b], as Megatron has its activations
    with pytest.raises(ValueError, match=rf"{name} has shape \(10, 3\) and mask \(3, 10\)"):
        pear_loss(logits, cu_seqlens=batch.cu_seqlens, config=PearConfig(), **inputs)


def test_the_report_holds_sums_and_counts():
    batch = make_batch([12, 9])
    config = PearConfig()
    loss, _, num_tokens, report = loss_and_gradient(batch, config, reward=batch.reward)
    assert num_tokens.dtype == torch.int32
    assert num_tokens.shape == ()
    assert num_tokens == batch.mask.sum()
    assert set(report) == {"loss", "nll"} | {f"pear/{name}" for name in STATISTICS}
    assert all(x.shape == (2,) and x.dtype == torch.float32 and not x.requires_grad for x in report.values())
    logprob = reference.logprob(batch.logits, batch.target, batch.mask)
    expected = {"loss": [loss, num_tokens], "nll": [-logprob.sum(), num_tokens]}
    _, stats = reference.weights(logprob, *batch.inputs()[2:], config)
    expected.update({f"pear/{name}": value for name, value in stats.items()})
    for name, (total, count) in expected.items():
        torch.testing.assert_close(report[name][0].item(), float(total), rtol=1e-5, atol=1e-5)
        assert report[name][1] == count


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_micro_batch_without_decisions_is_zero_and_not_nan(variant):
    batch = make_batch([12, 9])
    batch.mask[:] = False
    batch.logits[:] = float("nan")
    loss, grad, num_tokens, report = loss_and_gradient(
        batch, PearConfig(variant=variant), reward=batch.reward
    )
    assert loss == 0
    assert not grad.any()
    assert num_tokens == 0
    assert all(value.tolist() == [0.0, 0.0] for value in report.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"behavior_logprobs": None}, "variant 'token' needs behavior_logprobs; only 'none' does without"),
        (
            {"token_weights": torch.ones(20)},
            r"token_weights has shape \(20,\) and mask \(21,\); give one number per token of this rank",
        ),
        ({"token_weights": torch.ones(21).long()}, r"token_weights are torch.int64; give floating-point"),
        (
            {"reward": torch.ones(3)},
            r"reward has 3 entries; give one per trajectory \(2\) or per token \(21\)",
        ),
        ({"mask": torch.ones(20).bool()}, r"mask has shape \(20,\), but logits \(21, 60\)"),
        ({"behavior_logprobs": torch.zeros(20)}, r"behavior_logprobs has shape \(20,\)"),
        ({"behavior_logprobs": torch.zeros(21).half()}, "behavior_logprobs are float16"),
        ({"normalization": "trajectories"}, "must be 'token' or 'trajectory', got 'trajectories'"),
        ({"cu_seqlens": torch.tensor([0, 20])}, "cu_seqlens must end at the number of tokens 21, got 20"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    inputs = {**vars(make_batch([12, 9])), **change}
    with pytest.raises(ValueError, match=message):
        pear_loss(config=PearConfig(), **inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"config": {"variant": "none"}}, TypeError, r"got dict; pass PearConfig\(\*\*config\)"),
        ({"cu_seqlens": [0, 12, 21]}, TypeError, "cu_seqlens must be a tensor, got list"),
        ({"logits": [[0.0]]}, TypeError, "logits must be a tensor, got list"),
        ({"target": [1, 2]}, TypeError, "target must be a tensor, got list"),
        (
            {"reward": [1.0, 2.0]},
            TypeError,
            r"reward must be a tensor, got list; give torch.as_tensor\(reward\)",
        ),
        ({"token_weights": [1.0] * 21}, TypeError, "token_weights must be a tensor, got list"),
        ({"mask": torch.ones(21)}, ValueError, "mask must be bool .True on decisions., got torch.float32"),
        (
            {"target": torch.zeros(21, device="meta").long()},
            ValueError,
            "target is on meta and the log-probs",
        ),
        ({"token_weights": torch.zeros(21, device="meta")}, ValueError, "token_weights is on meta"),
    ],
)
def test_what_is_no_tensor_no_config_or_elsewhere_is_named(change, error, message):
    inputs = {**vars(make_batch([12, 9])), "config": PearConfig(), **change}
    with pytest.raises(error, match=message):
        pear_loss(**inputs)


def test_a_diverged_model_gives_a_loss_of_nan_and_no_error():
    """The trainer finds it, names the trajectories and stops."""
    batch = make_batch([12, 9])
    batch.logits[:] = NAN
    for config, behavior in ((PearConfig(), batch.behavior_logprobs), (PearConfig(variant="none"), None)):
        batch.behavior_logprobs = behavior
        loss, _, num_tokens, report = loss_and_gradient(batch, config)
        assert loss.isnan()
        assert report["loss"][0].isnan()
        assert num_tokens == batch.mask.sum()


def test_bad_behaviour_logprobs_are_no_nan_loss_but_an_error():
    batch = make_batch([12, 9])
    batch.mask[3], batch.target[3], batch.behavior_logprobs[3] = True, 0, NAN
    with pytest.raises(
        ValueError, match="first at token 3 of the pack .*: nan, as if it had never been filled in"
    ):
        loss_and_gradient(batch, PearConfig())


EVERY_CONFIG = [*CONFIGS, PearConfig(control="shuffled"), *NEIGHBOURS.values()]


def loss_of_a_shard(
    rank: int, batch: Batch, tp: int, options: dict[str, Any]
) -> list[tuple[Tensor, Tensor, Tensor, dict]]:
    """Ranks tp-first, as Megatron orders them: rank = cp_rank * tp + tp_rank."""
    ranks = torch.distributed.get_world_size()
    cp = ranks // tp
    tp_groups = [torch.distributed.new_group(list(range(i * tp, (i + 1) * tp))) for i in range(cp)]
    cp_groups = [torch.distributed.new_group(list(range(i, ranks, tp))) for i in range(tp)]
    cp_rank, tp_rank = divmod(rank, tp)
    whole = (*batch.inputs()[:4], batch.token_weights, batch.reference_logprobs)
    logits, *of_tokens, factors, of_reference = (zigzag(x, batch.cu_seqlens, cp_rank, cp) for x in whole)
    shard = Batch(logits.chunk(tp, -1)[tp_rank], *of_tokens, batch.cu_seqlens, batch.reward, factors)
    options = {"tp_group": tp_groups[cp_rank], "cp_group": cp_groups[tp_rank], **options}
    return [
        loss_and_gradient(
            shard,
            config,
            reward=batch.reward,
            token_weights=factors,
            reference_logprobs=of_reference,
            **options,
        )
        for config in EVERY_CONFIG
    ]


def assert_shards_equal_one(
    by_rank: list[Any], one: Any, tp: int, cu_seqlens: torch.Tensor, *, atol: float
) -> None:
    """Ranks of TP x CP together give one rank's (loss, gradient, tokens, report); ``atol`` is the gradient's."""
    loss, grad, num_tokens, report = one
    one_per_cp_rank, cp = by_rank[::tp], len(by_rank) // tp
    torch.testing.assert_close(sum(r[0] for r in one_per_cp_rank), loss, rtol=1e-5, atol=1e-5)
    assert sum(r[2] for r in one_per_cp_rank) == num_tokens
    for name, value in report.items():
        total = sum(r[3][name] for r in one_per_cp_rank)
        torch.testing.assert_close(total, value, rtol=1e-5, atol=1e-5)
    for rank, results in enumerate(by_rank):
        cp_rank, tp_rank = divmod(rank, tp)
        expected = zigzag(grad, cu_seqlens, cp_rank, cp).chunk(tp, -1)[tp_rank]
        torch.testing.assert_close(results[1], expected, rtol=1e-5, atol=atol)
        assert torch.equal(results[0], one_per_cp_rank[cp_rank][0])  # alike on all TP ranks


@pytest.mark.parametrize("normalization", ["token", "trajectory"])
@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (1, 2), (2, 2)])
def test_tensor_and_context_parallel_ranks_together_equal_one(tp, cp, normalization):
    batch = with_reference(make_batch([12, 8, 0, 24]))
    batch.mask[12:18] = False  # the decisions of a trajectory may all be on one rank
    options = {
        "normalization": normalization,
        "source": torch.tensor([1, 0, 0, 1]),
        "num_sources": 2,
    }
    by_rank = run_ranks(tp * cp, loss_of_a_shard, batch, tp, options)
    for i, config in enumerate(EVERY_CONFIG):
        one = loss_and_gradient(
            batch,
            config,
            reward=batch.reward,
            token_weights=batch.token_weights,
            reference_logprobs=batch.reference_logprobs,
            **options,
        )
        assert_shards_equal_one([results[i] for results in by_rank], one, tp, batch.cu_seqlens, atol=1e-6)
