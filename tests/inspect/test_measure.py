"""inspect computes what training computes: same arrays, same op, same numbers as the first step logs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pear_megatron import PearConfig, importance_weights
from pear_megatron.data import Trajectory
from pear_megatron.inspect.alternatives import alternatives
from pear_megatron.inspect.measure import Pack, make_pack, weigh
from pear_megatron.ops import reference
from tests.distributed import run_ranks
from tests.megatron.ranks import SMALL, train_runs
from tests.structured import VOCAB_SIZE, make_rows, write_rows


def trajectories(count: int = 70, seed: int = 0) -> tuple[list[Trajectory], list[np.ndarray]]:
    """More than one collated part; decisions with gaps; mixed rewards."""
    generator = np.random.default_rng(seed)
    made, policy = [], []
    for i in range(count):
        n = int(generator.integers(4, 30))
        mask = generator.random(n) < 0.6
        mask[0], mask[-1] = False, True
        lb = np.where(mask, -generator.exponential(1.0, n), 0).astype(np.float32)
        ids = generator.integers(0, 50, n).astype(np.int32)
        made.append(Trajectory(f"t{i}", ids, mask, lb, float(generator.choice([1.0, 0.0, -0.5]))))
        policy.append(np.where(mask, lb + generator.normal(-0.1, 0.2, n), 7.0).astype(np.float32))
    return made, policy


def test_arrays_are_the_decisions_in_order() -> None:
    made, policy = trajectories()
    pack = make_pack(made, policy)
    masks = [t.loss_mask for t in made]
    assert np.array_equal(pack.lp, np.concatenate([lp[m] for lp, m in zip(policy, masks, strict=True)]))
    assert np.array_equal(pack.lb, np.concatenate([t.behavior_logprobs[t.loss_mask] for t in made]))
    assert pack.num_decisions.tolist() == [int(m.sum()) for m in masks]
    assert pack.position.tolist() == [k for m in masks for k in range(int(m.sum()))]
    assert pack.reward.tolist() == [t.reward for t in made]


@pytest.mark.parametrize("variant", ["token", "block", "sequence"])
def test_weights_are_the_references(variant: str) -> None:
    made, policy = trajectories(count=9)
    config = PearConfig.model_validate({"variant": variant, "baseline": "sequence_mean"})
    pack = make_pack(made, policy)
    expected, _ = reference.weights(pack.logprobs, pack.behavior_logprobs, pack.mask, pack.cu_seqlens, config)
    np.testing.assert_allclose(weigh(pack, config).weight, expected[pack.mask].numpy(), rtol=1e-5)


def test_statistics_by_sign_are_those_of_the_trajectories_alone() -> None:
    made, policy = trajectories()
    both = weigh(make_pack(made, policy), PearConfig())
    for negative, statistics in ((True, both.negative), (False, both.positive)):
        chosen = [i for i, t in enumerate(made) if (t.reward < 0) == negative]
        alone = weigh(make_pack([made[i] for i in chosen], [policy[i] for i in chosen]), PearConfig())
        assert statistics == pytest.approx(alone.statistics, rel=1e-5)
    share = both.effective_sample_size.mean()
    assert share == pytest.approx(both.statistics["effective_sample_size"], rel=1e-5)


def test_alternatives_begin_with_the_given_settings_and_are_what_they_say() -> None:
    made, policy = trajectories()
    pack, given = make_pack(made, policy), PearConfig(gamma=0.9)
    settings = alternatives(pack, given)
    assert settings[0].overrides == ""
    assert settings[0].statistics == weigh(pack, given).statistics
    assert len({setting.overrides for setting in settings}) == len(settings)
    for setting in settings[1:]:
        changes = dict(part.removeprefix("pear.").split("=") for part in setting.overrides.split())
        values = {k: json.loads(v) if v.startswith("[") else v for k, v in changes.items()}
        config = PearConfig.model_validate(given.model_dump() | values)
        assert config != given
        assert weigh(pack, config).statistics == setting.statistics


def test_the_level_discount_leaves_no_drift() -> None:
    made, policy = trajectories()
    rng = np.random.default_rng(1)
    pack = make_pack(made, [lp - 2.0 * (rng.random(len(lp)) < 0.2).astype(np.float32) for lp in policy])
    (level,) = (setting for setting in alternatives(pack, PearConfig()) if "pear.gamma" in setting.overrides)
    mean = np.bincount(pack.segment, pack.log_ratio) / pack.num_decisions
    clipped = np.clip(pack.log_ratio - mean[pack.segment], -0.3, 0.3)
    gamma = float(re.search(r"pear.gamma=([\d.]+)", level.overrides)[1])
    assert gamma == pytest.approx(np.exp(-clipped.mean()), abs=5e-4)


def with_reference(pack: Pack) -> Pack:
    generator = torch.Generator().manual_seed(1)
    noise = 0.3 * torch.randn(len(pack.mask), generator=generator)
    return replace(pack, reference_logprobs=(pack.behavior_logprobs + noise).clamp_max(0.0))


def test_the_other_methods_are_shown_and_not_advised() -> None:
    pack = with_reference(make_pack(*trajectories()))
    shown = {setting.overrides: setting for setting in alternatives(pack, PearConfig())}
    for methods in (
        "pear.variant=sequence pear.sequence_scale=mean",
        "pear.ratio=reference",
        "pear.variant=none pear.dft_power=1.0",
    ):
        assert not shown[methods].remedy
    expected = pack.logprobs[pack.mask].exp().mean()
    assert shown["pear.variant=none pear.dft_power=1.0"].statistics["weight"] == pytest.approx(expected)
    without = alternatives(make_pack(*trajectories()), PearConfig())
    assert not any("reference" in setting.overrides for setting in without)
    of_sequence = {s.overrides: s for s in alternatives(pack, PearConfig(variant="sequence"))}
    assert of_sequence["pear.sequence_scale=mean"].remedy


def test_weights_with_factors_are_those_of_training() -> None:
    pack = with_reference(make_pack(*trajectories()))
    config = PearConfig(ratio="reference", dft_power=0.5, negative_floor=0.1, entropy_power=1.0)
    weights = weigh(pack, config)
    expected, sums = importance_weights(
        pack.logprobs,
        pack.behavior_logprobs,
        pack.mask,
        pack.cu_seqlens,
        config.model_copy(update={"entropy_power": 0.0}),  # entropies are not known
        reference_logprobs=pack.reference_logprobs,
        reward=torch.from_numpy(pack.reward),
    )
    assert np.array_equal(weights.weight, expected[pack.mask].numpy())
    stopped, negative = sums["negative_stopped"].tolist()
    assert 0 < stopped < negative
    assert weights.statistics["negative_stopped"] == pytest.approx(stopped / negative)
    assert weights.negative is not None
    assert weights.negative["negative_stopped"] == pytest.approx(stopped / negative)
    assert (pack.fallen > 0.1).sum() == stopped


def rank_inspect(rank: int, data: Path, model: Path, output: Path, overrides: list[str]) -> None:
    from pear_megatron.inspect.run import run
    from pear_megatron.inspect.settings import read_settings
    from tests.megatron.ranks import be_quiet
    from tests.megatron.runs import TINY

    be_quiet()
    settings = read_settings(
        [str(data)], overrides, recipe=TINY, model=str(model), tokenizer=None, seq_length=1, text={}
    )
    run(settings, model=str(model), scored=False, output=output, max_trajectories=512, seed=0)


def test_numbers_are_those_that_trainings_first_step_logs(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", make_rows(20, seed=2))
    model = [f"model.vocab_size={VOCAB_SIZE}", "train.global_batch_size=16"]
    policy, run = tmp_path / "policy", tmp_path / "run"
    train_runs(1, data, {policy: [*model, "train.max_steps=12", "optimizer.lr=1e-2", "pear.variant=none"]})
    pear = ["pear.variant=block", "pear.baseline=sequence_mean"]
    logged = train_runs(1, data, {run: [*model, *pear, f"checkpoint.pretrained={policy}"]})[run][0]
    overrides = [*SMALL, *model, *pear, f"output_dir={tmp_path}"]
    run_ranks(1, rank_inspect, data, policy, tmp_path / "page.html", overrides)
    found = json.loads((tmp_path / "page.json").read_text())["statistics"]["all"]
    assert logged["decisions"] == 20 * 56
    assert found == pytest.approx({name: logged[f"pear/{name}"] for name in found}, rel=1e-4, abs=1e-6)
    assert abs(found["log_ratio"]) > 0.01
    assert torch.isfinite(torch.tensor(list(found.values()))).all()


def _alike(log_ratios: list[np.ndarray]) -> Pack:
    """Trajectories with these log ratios, every position a decision but the first."""
    made, policy = [], []
    for i, log_ratio in enumerate(log_ratios):
        n = len(log_ratio) + 1
        lb = np.concatenate([[0.0], np.full(n - 1, -1.0)]).astype(np.float32)
        ids, mask = np.zeros(n, np.int32), np.arange(n) > 0
        made.append(Trajectory(f"t{i}", ids, mask, lb, 1.0))
        policy.append(lb + np.concatenate([[0.0], log_ratio]).astype(np.float32))
    return make_pack(made, policy)


def test_content_is_what_weights_say_beyond_the_place() -> None:
    everywhere = _alike([np.full(n, -0.05) for n in range(10, 60)])
    for variant in ("token", "sequence"):  # log weights are -0.05 for each decision that follows: place alone
        assert weigh(everywhere, PearConfig(variant=variant, gamma=1.0)).content < 1e-6
    # Half of the trajectories are followed, half are not: log weights at a place differ by 0.08 per decision left.
    halves = _alike([np.full(20, value) for value in (0.0, -0.08) * 50])
    token, sequence = (
        weigh(halves, PearConfig(variant=variant, gamma=1.0)).content for variant in ("token", "sequence")
    )
    left = np.arange(20)
    assert token == pytest.approx(0.04 * np.sqrt((left**2).mean()), rel=1e-3)
    assert sequence == pytest.approx(0.04 * 20, rel=1e-3)


def test_plain_sft_has_no_content_and_few_trajectories_are_no_trouble() -> None:
    made, policy = trajectories(count=2)
    assert weigh(make_pack(made, policy), PearConfig(variant="none")).content == 0.0
    for variant in ("token", "block", "sequence"):
        assert weigh(make_pack(made[:1], policy[:1]), PearConfig(variant=variant)).content >= 0.0
