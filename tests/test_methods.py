"""docs/methods.md: every line of settings is a PearConfig, and its loss is the formula that the table gives.

The formulas are written here on their own, a trajectory at a time and in probabilities rather than logs, and compared
with the float64 reference in value and in the gradient of the logits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from pear_megatron import PearConfig, pear_loss
from pear_megatron.ops import reference

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
SETTINGS = re.compile(r"`pear: (\{[^`]*\})`")
VOCABULARY, K = 40, 5


def settings_of_methods() -> dict[str, PearConfig]:
    """The table's rows: the name without its link, and the settings."""
    found = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("|") and (settings := SETTINGS.search(line)):
            name = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line.split("|")[1]).strip()
            found[name.removesuffix(" (ours)")] = PearConfig(**yaml.safe_load(settings[1]))
    return found


@dataclass
class Trajectory:
    """The decisions of a trajectory: log-probs [n], all log-probs [n, V], the behaviour's top-k [n, k], its reward."""

    lp: Tensor
    lb: Tensor
    lr: Tensor
    log_pi: Tensor
    ids: Tensor
    q: Tensor
    reward: float

    @property
    def p(self) -> Tensor:
        """[n], without a gradient."""
        return self.lp.detach().exp()


@dataclass
class Pack:
    """Random logits of three policies over trajectories end to end."""

    logits: Tensor
    behavior: Tensor
    reference: Tensor
    target: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    reward: Tensor

    def trajectories(self) -> list[Trajectory]:
        """Those with decisions, differentiable in ``logits``."""
        of_token = [x.log_softmax(-1) for x in (self.logits, self.behavior, self.reference)]
        chosen = [x[range(len(self.target)), self.target] for x in of_token]
        log_q, ids = of_token[1].topk(K)
        out = []
        for s, (a, b) in enumerate(pairwise(self.cu_seqlens.tolist())):
            at = [t for t in range(a, b) if self.mask[t]]
            lp, lb, lr = (x[at] for x in chosen)
            out.append(
                Trajectory(lp, lb, lr, of_token[0][at], ids[at], log_q[at].exp(), float(self.reward[s]))
            )
        return [x for x in out if len(x.lp)]

    def loss(self, config: PearConfig) -> Tensor:
        """The reference's."""
        chosen = [x.log_softmax(-1) for x in (self.behavior, self.reference)]
        lb, lr = (x[range(len(self.target)), self.target] for x in chosen)
        log_q, ids = chosen[0].topk(K)
        return reference.loss_sum(
            self.logits, self.target, lb, self.mask, self.cu_seqlens, config, reward=self.reward,
            reference_logprobs=lr, behavior_topk=(ids.int(), log_q),
        )  # fmt: skip


@pytest.fixture
def pack() -> Pack:
    """Policies that differ by enough for every clip to bite, and one negative example."""
    torch.manual_seed(0)
    lengths = [9, 2, 30, 6]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(cu[-1])
    start = 2.0 * torch.randn(tokens, VOCABULARY, dtype=torch.float64)
    near, far = (0.3 * torch.randn_like(start), 1.5 * torch.randn_like(start))
    share = torch.linspace(0, 1, tokens, dtype=torch.float64).unsqueeze(1)  # from near to far
    logits = (start + (1 - share) * near + share * far).requires_grad_()
    behavior = start + 0.3 * torch.randn_like(start)
    mask = torch.rand(tokens) < 0.8
    target = behavior.softmax(-1).multinomial(1).squeeze(1)
    initial = start.clone()
    initial[: lengths[0]] *= -1.0  # one that the model has come far from
    return Pack(logits, behavior, initial, target, mask, cu, torch.tensor([1.0, 0.5, 1.0, -1.0]))


def ratios(x: Trajectory) -> Tensor:
    """Clipped as PEAR clips them."""
    return (x.p / x.lb.exp()).clamp(math.exp(-0.08), math.exp(0.3))


def product_after(x: Trajectory, block: int = 1) -> Tensor:
    """PEAR's weight of each decision, by the ratios after the decision's block."""
    discounted, n = 0.999 * ratios(x), len(x.lp)
    after = [min((t // block + 1) * block, n) for t in range(n)]
    products = torch.stack([discounted[a:].prod() for a in after])
    return products.clamp(math.exp(-10), math.exp(5))


def kl(x: Trajectory, tail: bool = False) -> Tensor:
    """From the top-k, and perhaps the rest as one more, to the target policy."""
    pi = x.log_pi.exp().gather(1, x.ids)
    q = x.q if tail else x.q / x.q.sum(1, keepdim=True)
    if tail:
        q, pi = (torch.cat([y, 1 - y.sum(1, keepdim=True)], 1) for y in (q, pi))
    return (q * (q / pi).log()).sum(1)


def entropy(x: Trajectory) -> Tensor:
    return torch.distributions.Categorical(logits=x.log_pi.detach()).entropy()


FORMULAS: dict[str, Callable[[Trajectory], Tensor]] = {
    "SFT": lambda x: -x.lp,
    "PEAR, token": lambda x: -product_after(x) * x.lp,
    "PEAR, block": lambda x: -product_after(x, 4) * x.lp,
    "PEAR, sequence": lambda x: -ratios(x).prod().clamp(math.exp(-10), math.exp(5)) * x.lp,
    "sequence, by its mean": lambda x: (
        -ratios(x).prod().pow(8 / len(x.lp)).clamp(math.exp(-10), math.exp(5)) * x.lp
    ),
    "DFT": lambda x: -x.p * x.lp,
    "DFT with a floor": lambda x: -x.p.clamp_min(0.1) * x.lp,
    "power family": lambda x: (1 - x.lp.exp() ** 8) / 8,
    "PriFT-prob": lambda x: -x.lr.exp() * x.lp,
    "iw-SFT, sequence": lambda x: -(x.lp.detach() - x.lr).mean().exp().clamp_max(16.0) * x.lp,
    "iw-SFT, token": lambda x: -(x.p / x.lr.exp()).clamp(0.2, 1.8) * x.lp,
    "EAFT": lambda x: -(entropy(x) / math.log(20)).clamp_max(1.0) * x.lp,
    "ASFT": lambda x: (-x.p * x.lp + 0.1 * kl(x, tail=True)) / 1.1,
    "KL distillation": lambda x: kl(x),
    "KL with the rest": lambda x: kl(x, tail=True),
    "KL and NLL": lambda x: 0.5 * kl(x) - 0.5 * x.lp,
    "PEAR, token, of a KL": lambda x: product_after(x) * kl(x),
    "negatives that stop": lambda x: (
        -product_after(x) * x.lp * ((x.reward >= 0) | (x.lp.detach() >= x.lb - 0.5))
    ),
}  # fmt: skip
# What a detached weight cannot give: the loss whose gradient it has.
OF_GRADIENT_ALONE = ("power family",)


def test_the_table_and_the_formulas_are_of_the_same_methods():
    assert list(settings_of_methods()) == list(FORMULAS)


def test_all_settings_on_the_page_are_in_the_table():
    assert len(SETTINGS.findall(PAGE.read_text())) == len(settings_of_methods())


@pytest.mark.parametrize("method", FORMULAS)
def test_the_settings_are_the_method(pack: Pack, method: str):
    ours = pack.loss(settings_of_methods()[method])
    theirs = sum(x.reward * FORMULAS[method](x).sum() for x in pack.trajectories())
    if method not in OF_GRADIENT_ALONE:
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    of_ours, of_theirs = (torch.autograd.grad(loss, pack.logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", FORMULAS)
def test_the_ops_compute_it(pack: Pack, method: str):
    config = settings_of_methods()[method]
    lb, lr = (
        y.log_softmax(-1)[range(len(pack.target)), pack.target].float()
        for y in (pack.behavior, pack.reference)
    )
    log_q, ids = pack.behavior.log_softmax(-1).topk(K)
    logits = pack.logits.detach().float().requires_grad_()
    loss, _, _ = pear_loss(
        logits, pack.target, lb, pack.mask, pack.cu_seqlens, config, reward=pack.reward,
        reference_logprobs=lr, behavior_topk=(ids.int(), log_q.float()),
    )  # fmt: skip
    exact = pack.loss(config)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    of_ops, of_exact = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(exact, pack.logits)[0]
    torch.testing.assert_close(of_ops.double(), of_exact, rtol=1e-5, atol=1e-5)


def test_the_pack_tells_every_method_from_every_other(pack: Pack):
    """So that the test above compares something."""
    gradients = {
        name: torch.autograd.grad(pack.loss(config), pack.logits)[0]
        for name, config in settings_of_methods().items()
    }
    for one, two in combinations(gradients, 2):
        assert not torch.allclose(gradients[one], gradients[two], rtol=1e-2, atol=1e-3), (one, two)
    means = torch.stack([(x.lp.detach() - x.lr).mean() for x in pack.trajectories()])
    assert float(means.min()) < 0 < math.log(16) < float(means.max())  # iw-SFT's clip bites


def test_a_factor_that_is_fixed_before_training_can_be_token_weights(pack: Pack):
    """PriFT-prob, both ways."""
    lr = pack.reference.log_softmax(-1)[range(len(pack.target)), pack.target]
    lb = pack.behavior.log_softmax(-1)[range(len(pack.target)), pack.target]
    ours = reference.loss_sum(
        pack.logits, pack.target, lb, pack.mask, pack.cu_seqlens, PearConfig(variant="none"),
        token_weights=lr.exp(),
    )  # fmt: skip
    pack.reward = torch.ones(4)
    torch.testing.assert_close(ours, pack.loss(settings_of_methods()["PriFT-prob"]))


def test_the_entropy_factor_is_never_below_eafts(pack: Pack):
    log_pi = pack.logits.detach().log_softmax(-1)
    top = torch.distributions.Categorical(logits=log_pi.topk(20).values).entropy() / math.log(20)
    whole = (torch.distributions.Categorical(logits=log_pi).entropy() / math.log(20)).clamp_max(1.0)
    assert bool((whole >= top).all())
    assert float((whole - top).max()) > 0.01
    narrow = log_pi.topk(20).values.log_softmax(-1)  # 20 tokens hold all mass
    torch.testing.assert_close(torch.distributions.Categorical(logits=narrow).entropy() / math.log(20), top)


def test_a_kl_that_is_not_renormalised_has_the_gradient_of_ours_times_its_mass(pack: Pack):
    """verl's forward_kl_topk."""
    for x in pack.trajectories():
        theirs = (x.q * (x.q.log() - x.log_pi.gather(1, x.ids))).sum()
        ours = (x.q.sum(1) * kl(x)).sum()
        of_theirs, of_ours = (
            torch.autograd.grad(y, pack.logits, retain_graph=True)[0] for y in (theirs, ours)
        )
        torch.testing.assert_close(of_theirs, of_ours)


def test_a_kl_is_never_negative_and_with_the_rest_never_above_the_whole(pack: Pack):
    log_q, log_pi = pack.behavior.log_softmax(-1), pack.logits.detach().log_softmax(-1)
    whole = (log_q.exp() * (log_q - log_pi)).sum(1)
    everywhere = torch.ones_like(pack.mask)
    last = torch.zeros(())
    for k in (1, K, VOCABULARY - 1):
        log_top, ids = log_q.topk(k)
        assert bool((reference.topk_kl(log_pi, ids, log_top, everywhere, "none") >= 0).all())
        bucket = reference.topk_kl(log_pi, ids, log_top, everywhere, "bucket")
        assert bool((last - 1e-12 <= bucket).all())
        assert bool((bucket <= whole + 1e-12).all())
        last = bucket
    torch.testing.assert_close(last, whole)  # the rest is a single token
