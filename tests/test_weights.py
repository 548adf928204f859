"""importance_weights against golden vectors, cases worked by hand, and the float64 reference."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from pear_megatron import PearConfig, importance_weights
from pear_megatron.ops import STATISTICS, reference
from pear_megatron.weights import weights_and_statistics
from tests.distributed import run_ranks, zigzag
from tests.packs import CONFIGS, SEQUENCE_MEAN, VARIANTS, Pack, config_id, make_pack

GOLDEN = json.loads((Path(__file__).parent / "golden" / "weights.json").read_text())["cases"]
INF, NAN = float("inf"), float("nan")


def golden_config(case: dict) -> PearConfig:
    names = {"rc": "log_ratio_clip", "wc": "log_weight_clip"}
    return PearConfig(**{names.get(key, key): value for key, value in case["config"].items()})


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "-".join(map(str, case["config"].values())))
def test_golden_vectors(case):
    lp, lb = torch.tensor(case["logprobs"]), torch.tensor(case["behavior_logprobs"])
    mask, cu = torch.tensor(case["mask"], dtype=torch.bool), torch.tensor(case["cu_seqlens"])
    weights, _ = importance_weights(lp, lb, mask, cu, golden_config(case))
    expected = torch.tensor(case["weights"], dtype=torch.float64)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)


WIDE = {"log_ratio_clip": (-0.5, 0.5), "gamma": 1.0}

# log ratios of the decisions, in order -> weights, worked by hand.
BY_HAND = {
    # 0.3 - 0.2 = 0.1, 0.3, 0
    "token": (WIDE, [0.1, -0.2, 0.3], [1.105171, 1.349859, 1.0]),
    # the same times 0.25, 0.5, 1
    "token_discounted": ({**WIDE, "gamma": 0.5}, [0.1, -0.2, 0.3], [0.276293, 0.674929, 1.0]),
    # 5 and -5 count as 0.3 and -0.08: -0.08 + 0.1 = 0.02, 0.1, 0
    "ratios_clipped": ({"gamma": 1.0}, [5.0, -5.0, 0.1], [1.020201, 1.105171, 1.0]),
    # 0.25 for the block of two, 0.05 for the next, 0 for the short last
    "block": (
        {**WIDE, "variant": "block", "block_size": 2},
        [0.1, 0.2, 0.3, -0.1, 0.05],
        [1.284025, 1.284025, 1.051271, 1.051271, 1.0],
    ),
    # 0.1 - 0.2 + 0.3 = 0.2 for all; the discount plays no part
    "sequence": ({**WIDE, "variant": "sequence", "gamma": 0.5}, [0.1, -0.2, 0.3], [1.221403] * 3),
    # each its own ratio, 5 as 0.5; no discount
    "own": ({**WIDE, "variant": "own", "gamma": 0.5}, [0.1, -0.2, 5.0], [1.105171, 0.818731, 1.648721]),
    # twice the mean of 0.1, -0.2 and 0.3
    "sequence_mean": (
        {**WIDE, "variant": "sequence", "sequence_scale": "mean", "tau": 2.0},
        [0.1, -0.2, 0.3],
        [1.142631] * 3,
    ),
    # log weights 1.2, 0.8, 0.4, 0 clipped to 1.0 above and 0.5 below
    "weights_clipped": (
        {**WIDE, "log_weight_clip": (0.5, 1.0)},
        [0.4, 0.4, 0.4, 0.4],
        [2.718282, 2.225541, 1.648721, 1.648721],
    ),
    # mean 0.2 leaves 0, 0.2, -0.2: 0, -0.2, 0
    "baseline": ({**WIDE, "baseline": "sequence_mean"}, [0.2, 0.4, 0.0], [1.0, 0.818731, 1.0]),
    # the token case over its mean, 1.151677
    "normalize": ({**WIDE, "normalize": "sequence"}, [0.1, -0.2, 0.3], [0.959619, 1.172082, 0.868299]),
    "none": ({"variant": "none"}, [0.1, -0.2, 0.3], [1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize(("settings", "log_ratios", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_a_case_by_hand(settings, log_ratios, expected):
    n = len(log_ratios)
    lb = torch.full((n,), -1.0)
    weights, _ = importance_weights(
        lb + torch.tensor(log_ratios),
        lb,
        torch.ones(n, dtype=torch.bool),
        torch.tensor([0, n]),
        PearConfig(**settings),
    )
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=2e-6, atol=0)


def test_statistics_by_hand():
    d = torch.tensor([0.5, -0.25, 0.125, 0.0, -0.5])
    config = PearConfig(gamma=1.0, log_ratio_clip=(-0.125, 0.25), log_weight_clip=(0.0, 0.125))
    # clipped 0.25, -0.125, 0.125: log weights 0, 0.125, 0; then 0, -0.125: -0.125 (to 0), 0
    _, stats = importance_weights(d, torch.zeros(5), torch.ones(5).bool(), torch.tensor([0, 3, 5]), config)
    total = 4 + 1.133148  # four weights of 1 and one of exp(0.125)
    effective = 3.133148**2 / (3 * (2 + 1.284025)) + 1
    expected = {
        "log_ratio": [-0.125, 5],
        "ratio_clipped_low": [2, 5],
        "ratio_clipped_high": [1, 5],
        "weight_at_floor": [4, 5],
        "weight_at_ceiling": [1, 5],
        "weight": [total, 5],
        "effective_sample_size": [effective, 2],
    }
    assert list(stats) == list(STATISTICS) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(stats[name], torch.tensor(value, dtype=torch.float32))


@pytest.mark.parametrize("config", [*CONFIGS, SEQUENCE_MEAN], ids=config_id)
def test_every_configuration_equals_the_reference(config):
    for lengths in ([40], [1, 0, 17, 3, 30, 2], [1], []):
        for spread in (0.05, 0.5):
            pack = make_pack(lengths, spread)
            weights, stats = importance_weights(*pack.inputs(), config)
            expected, expected_stats = reference.weights(*pack.inputs(), config)
            assert weights.dtype == torch.float32
            torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)
            assert stats.keys() == expected_stats.keys()
            for name, value in stats.items():
                torch.testing.assert_close(
                    value.double(),
                    torch.tensor(expected_stats[name], dtype=torch.float64),
                    rtol=1e-5,
                    atol=1e-5,
                )


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_packing_never_leaks_across_trajectories(config):
    pack = make_pack([12, 9, 15], spread=0.5)
    before, _ = importance_weights(*pack.inputs(), config)
    middle = slice(12, 21)
    pack.logprobs[middle] = torch.tensor([NAN, 3.0, float("inf")]).repeat(3)
    after, _ = importance_weights(*pack.inputs(), config)
    assert torch.equal(after[:12], before[:12])
    assert torch.equal(after[21:], before[21:])


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_tokens_between_decisions_add_no_ratio_and_no_discount(config):
    """Prompt, user and tool tokens, and whatever log-probs stand there: NaN, 0 or large."""
    pack = make_pack([30, 20], spread=0.5)
    weights, stats = importance_weights(*pack.inputs(), config)
    kept = pack.mask
    assert not weights[~kept].any()
    for junk in (NAN, 0.0, 1e4):
        pack.logprobs[~kept] = junk
        pack.behavior_logprobs[~kept] = -junk
        again, again_stats = importance_weights(*pack.inputs(), config)
        assert torch.equal(again, weights)
        assert all(torch.equal(again_stats[name], stats[name]) for name in stats)
    lengths = [int(kept[:30].sum()), int(kept[30:].sum())]
    alone, _ = importance_weights(
        pack.logprobs[kept],
        pack.behavior_logprobs[kept],
        kept[kept],
        torch.tensor([0, *lengths]).cumsum(0),
        config,
    )
    assert torch.equal(weights[kept], alone)


@pytest.mark.parametrize("normalize", ["none", "sequence"])
def test_blocks_of_one_are_the_token_variant(normalize):
    pack = make_pack([40, 7], spread=0.5)
    token, _ = importance_weights(*pack.inputs(), PearConfig(variant="token", normalize=normalize))
    config = PearConfig(variant="block", block_size=1, normalize=normalize)
    block, _ = importance_weights(*pack.inputs(), config)
    assert torch.equal(block, token)


def test_one_block_for_all_weighs_one():
    pack = make_pack([40, 7], spread=0.5, decisions=1.0)
    weights, _ = importance_weights(*pack.inputs(), PearConfig(variant="block", block_size=40))
    assert torch.equal(weights, torch.ones(47))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("clip", [(-0.08, 0.3), (-1e5, 1e5)])
@pytest.mark.parametrize("variant", ["token", "block", "sequence"])
def test_nothing_overflows_in_long_trajectories_with_huge_ratios(variant, clip, sign):
    n = 20_000
    lp, lb = torch.full((n,), -1e3), torch.zeros(n)
    if sign > 0:
        lp, lb = lb, lp
    config = PearConfig(variant=variant, log_ratio_clip=clip)
    mask, cu = torch.ones(n, dtype=torch.bool), torch.tensor([0, n])
    weights, stats = importance_weights(lp, lb, mask, cu, config)
    saturated = torch.tensor(5.0 if sign > 0 else -10.0).exp()
    assert weights.isfinite().all()
    torch.testing.assert_close(weights[0], saturated)
    assert weights[-1] == (saturated if variant == "sequence" else 1.0)
    assert all(value.isfinite().all() for value in stats.values())
    share = stats["weight_at_ceiling" if sign > 0 else "weight_at_floor"]
    assert share[0] / share[1] > 0.99


def test_a_nan_decision_stays_visible_in_its_trajectory_alone():
    pack = make_pack([6, 5, 6], decisions=1.0)
    pack.logprobs[8] = NAN  # third decision of the second trajectory
    for variant, reached in (("token", [6, 7]), ("block", [6, 7]), ("sequence", [6, 7, 8, 9, 10])):
        weights, stats = importance_weights(*pack.inputs(), PearConfig(variant=variant, block_size=2))
        assert weights.isnan().nonzero().flatten().tolist() == reached
        assert stats["weight"].isnan().tolist() == [True, False]
    normalized, _ = importance_weights(*pack.inputs(), PearConfig(normalize="sequence"))
    assert normalized.isnan().nonzero().flatten().tolist() == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_trajectories_without_decisions_count_nothing(config):
    pack = make_pack([5, 8, 4], decisions=1.0)
    pack.mask[:5] = pack.mask[13:] = False
    weights, stats = importance_weights(*pack.inputs(), config)
    inner = slice(5, 13)
    alone, alone_stats = importance_weights(
        pack.logprobs[inner], pack.behavior_logprobs[inner], pack.mask[inner], torch.tensor([0, 8]), config
    )
    assert not weights[~pack.mask].any()
    assert torch.equal(weights[inner], alone)
    assert all(torch.equal(stats[name], alone_stats[name]) for name in stats)

    pack.mask[:] = False
    weights, stats = importance_weights(*pack.inputs(), config)
    assert not weights.any()
    assert all(not value.any() for value in stats.values())


def test_an_empty_pack():
    weights, stats = importance_weights(*make_pack([]).inputs(), PearConfig())
    assert weights.shape == (0,)
    assert all(value.tolist() == [0.0, 0.0] for value in stats.values())


def test_effective_sample_size_is_one_with_equal_weights():
    pack = make_pack([30, 11], spread=0.5, decisions=1.0)
    for variant in ("none", "sequence"):
        _, stats = importance_weights(*pack.inputs(), PearConfig(variant=variant))
        torch.testing.assert_close(stats["effective_sample_size"], torch.tensor([2.0, 2.0]))
    _, stats = importance_weights(*pack.inputs(), PearConfig())
    assert 0 < stats["effective_sample_size"][0] < 2


def test_normalised_weights_have_mean_one():
    pack = make_pack([30, 11], spread=0.5)
    _, stats = importance_weights(*pack.inputs(), PearConfig(normalize="sequence"))
    total, count = stats["weight"]
    torch.testing.assert_close(total / count, torch.tensor(1.0))


def test_no_gradient_flows_through_the_weights():
    pack = make_pack([9])
    pack.logprobs.requires_grad_()
    weights, stats = importance_weights(*pack.inputs(), PearConfig())
    assert not weights.requires_grad
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_behaviour_logprobs_of_16_bits_are_refused(dtype):
    lp, lb, mask, cu = make_pack([9]).inputs()
    with pytest.raises(ValueError, match=r"behavior_logprobs are b?float16, which is too coarse.*float32"):
        importance_weights(lp, lb.to(dtype), mask, cu, PearConfig())


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (NAN, "nan, as if it had never been filled in; score the trajectory again"),
        (INF, "inf, so it is no log-probability .store log p, not p, not -log p."),
        (0.1, "0.1, so it is no log-probability"),
        (-INF, "-inf, so the behaviour policy cannot have sampled that token"),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_behaviour_logprob_that_is_none_is_refused_with_its_place(variant, value, why):
    pack = make_pack([6, 0, 5, 6], decisions=1.0)
    pack.mask[7] = False
    pack.behavior_logprobs[[7, 8, 12]] = value
    message = rf"on 2 of 16 decisions, first at token 8 of the pack \(token 2 of trajectory 2\): {why}"
    with pytest.raises(ValueError, match=message):
        importance_weights(*pack.inputs(), PearConfig(variant=variant))


def test_rounding_above_log_1_is_let_pass():
    pack = make_pack([6], decisions=1.0)
    pack.behavior_logprobs[2] = 9e-6
    weights, _ = importance_weights(*pack.inputs(), PearConfig())
    expected, _ = reference.weights(*pack.inputs(), PearConfig())
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)


def test_plain_sft_needs_no_behaviour_logprobs_and_bears_a_diverged_model():
    pack = make_pack([6, 5])
    for value in (-1.0, NAN, INF, -INF):
        pack.logprobs[:] = value
        weights, stats = importance_weights(
            pack.logprobs, None, pack.mask, pack.cu_seqlens, PearConfig(variant="none")
        )
        assert torch.equal(weights, pack.mask.float())
        assert stats["log_ratio"][0].isfinite() == (value == -1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config": {"variant": "token"}},
            r"config must be a PearConfig, got dict; pass PearConfig\(\*\*config\)",
        ),
        ({"config": "token"}, r"config must be a PearConfig, got str; pass PearConfig\(\.\.\.\)"),
        (
            {"cu_seqlens": [0, 9]},
            r"cu_seqlens must be a tensor, got list; give torch.as_tensor\(cu_seqlens\)",
        ),
        ({"logprobs": [0.0]}, "logprobs must be a tensor, got list"),
        ({"mask": [True]}, "mask must be a tensor, got list"),
        ({"behavior_logprobs": numpy.zeros(9)}, "behavior_logprobs must be a tensor, got ndarray"),
    ],
)
def test_what_is_no_tensor_or_no_config_is_a_type_error(change, message):
    inputs = {**vars(make_pack([9])), "config": PearConfig(), **change}
    with pytest.raises(TypeError, match=message):
        importance_weights(**inputs)


@pytest.mark.parametrize("name", ["behavior_logprobs", "mask"])
def test_a_tensor_on_another_device_is_named(name):
    inputs = vars(make_pack([9]))
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(
        ValueError, match=rf"{name} is on meta and the log-probs or logits are on .*give {name}.to"
    ):
        importance_weights(**inputs, config=PearConfig())


def test_behaviour_logprobs_that_require_a_gradient_are_refused():
    pack = make_pack([9])
    pack.behavior_logprobs.requires_grad_()
    with pytest.raises(
        ValueError, match="behavior_logprobs require a gradient.*give behavior_logprobs.detach"
    ):
        importance_weights(*pack.inputs(), PearConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"behavior_logprobs": torch.zeros(8)}, r"behavior_logprobs has shape \(8,\) and logprobs \(9,\)"),
        ({"mask": torch.ones(3, 3).bool()}, r"mask has shape \(3, 3\).*both must be \[T\]"),
        ({"logprobs": torch.zeros(3, 3)}, r"logprobs \(3, 3\); both must be \[T\]"),
        ({"mask": torch.ones(9)}, "mask must be bool .True on decisions., got torch.float32; give mask.bool"),
        ({"behavior_logprobs": torch.zeros(9).long()}, "behavior_logprobs are int64, which is too coarse"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "cu_seqlens must be integers of shape"),
        ({"cu_seqlens": torch.tensor([False, True])}, "cu_seqlens must be integers of shape"),
        ({"cu_seqlens": torch.tensor([0, 2**32 + 9])}, "cu_seqlens: beyond the .* tokens of a pack"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens must end at the number of tokens 9, got 8"),
        ({"cu_seqlens": torch.tensor([1, 9])}, "cu_seqlens must start at 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 9])}, "cu_seqlens must not decrease, got 5 then 4"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    inputs = {**vars(make_pack([9])), **change}
    with pytest.raises(ValueError, match=message):
        importance_weights(**inputs, config=PearConfig())


def weights_of_a_shard(rank: int, pack: Pack) -> list[tuple[Tensor, dict[str, Tensor]]]:
    group = torch.distributed.group.WORLD
    cu = pack.cu_seqlens
    shard = [zigzag(x, cu, rank, group.size()) for x in pack.inputs()[:3]]
    return [importance_weights(*shard, cu, config, cp_group=group) for config in CONFIGS]


@pytest.mark.parametrize("ranks", [2, 4])
def test_zigzag_ranks_together_equal_one_rank_bit_for_bit(ranks):
    pack = make_pack([16, 8, 0, 40, 8], spread=0.5)
    by_rank = run_ranks(ranks, weights_of_a_shard, pack)
    for i, config in enumerate(CONFIGS):
        weights, stats = importance_weights(*pack.inputs(), config)
        for rank, results in enumerate(by_rank):
            assert torch.equal(results[i][0], zigzag(weights, pack.cu_seqlens, rank, ranks))
        for name, value in stats.items():
            assert torch.equal(sum(results[i][1][name] for results in by_rank), value)


def error_of_an_odd_length(rank: int) -> str:
    lp, lb, mask, _ = make_pack([8]).inputs()
    with pytest.raises(ValueError) as caught:
        importance_weights(
            lp, lb, mask, torch.tensor([0, 10, 16]), PearConfig(), cp_group=torch.distributed.group.WORLD
        )
    return str(caught.value)


def test_lengths_that_ranks_cannot_share_are_refused_on_every_rank():
    for message in run_ranks(2, error_of_an_odd_length):
        assert "segment 0 has 10 tokens, not divisible by 4" in message
        assert "pad each trajectory to a multiple of 4" in message


SHUFFLED = [
    PearConfig(variant=variant, baseline=baseline, control=control)
    for control in ("shuffled", "shuffled_by_place")
    for variant in ("token", "block", "sequence")
    for baseline in ("none", "sequence_mean")
]


@pytest.mark.parametrize("config", SHUFFLED, ids=config_id)
def test_shuffled_weights_are_the_same_weights_on_other_decisions(config):
    pack = make_pack([40, 0, 17, 9], spread=0.5)
    plain, stats = importance_weights(*pack.inputs(), config.model_copy(update={"control": "none"}))
    shuffled, shuffled_stats = importance_weights(*pack.inputs(), config)
    assert not shuffled[~pack.mask].any()
    assert not torch.equal(shuffled, plain)
    assert torch.equal(shuffled[pack.mask].sort().values, plain[pack.mask].sort().values)
    again, _ = importance_weights(*pack.inputs(), config)
    assert torch.equal(again, shuffled)
    for name, value in stats.items():  # of the weights as PEAR made them
        assert torch.equal(shuffled_stats[name], value)


@pytest.mark.parametrize("baseline", ["none", "sequence_mean"])
def test_weights_shuffled_by_place_stay_as_far_from_the_end(baseline):
    pack = make_pack([40, 0, 17, 9, 30], spread=0.5)
    plain, _ = importance_weights(*pack.inputs(), PearConfig(baseline=baseline))
    config = PearConfig(baseline=baseline, control="shuffled_by_place")
    shuffled, _ = importance_weights(*pack.inputs(), config)
    found: dict[int, tuple[list[float], list[float]]] = {}
    bounds = pack.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        decisions = [t for t in range(start, end) if pack.mask[t]]
        for place, t in enumerate(reversed(decisions)):
            before, after = found.setdefault(place, ([], []))
            before.append(float(plain[t]))
            after.append(float(shuffled[t]))
    assert all(sorted(before) == sorted(after) for before, after in found.values())
    assert any(before != after for before, after in found.values())


def test_the_order_of_shuffling_is_the_datas_and_not_the_models():
    """Tensor-parallel ranks differ in a log-prob's last bits and must not differ in the order."""
    pack = make_pack([40, 17], spread=0.5)
    orders = []
    for change in (0.0, 1e-6):
        pack.logprobs += change
        plain, _ = importance_weights(*pack.inputs(), PearConfig())
        shuffled, _ = importance_weights(*pack.inputs(), PearConfig(control="shuffled"))
        orders.append([int((plain - weight).abs().argmin()) for weight in shuffled[pack.mask]])
    assert orders[0] == orders[1]
    torch.manual_seed(5)  # nor has the global generator a part in it
    again, _ = importance_weights(*pack.inputs(), PearConfig(control="shuffled"))
    assert torch.equal(again, shuffled)


def test_shuffling_nothing_gives_nothing():
    pack = make_pack([9])
    pack.mask[:] = False
    weights, _ = importance_weights(*pack.inputs(), PearConfig(control="shuffled"))
    assert not weights.any()


def shuffled_weights_of_a_shard(rank: int, pack: Pack) -> list[Tensor]:
    group = torch.distributed.group.WORLD
    shard = [zigzag(x, pack.cu_seqlens, rank, group.size()) for x in pack.inputs()[:3]]
    return [importance_weights(*shard, pack.cu_seqlens, config, cp_group=group)[0] for config in SHUFFLED]


def test_context_parallel_ranks_shuffle_over_the_whole_pack():
    pack = make_pack([16, 8, 0, 40, 8], spread=0.5)
    by_rank = run_ranks(2, shuffled_weights_of_a_shard, pack)
    for i, config in enumerate(SHUFFLED):
        weights, _ = importance_weights(*pack.inputs(), config)
        for rank, shards in enumerate(by_rank):
            assert torch.equal(shards[i], zigzag(weights, pack.cu_seqlens, rank, 2))


PROBABILITIES = torch.tensor([0.5, 0.25, 0.01])

# settings, what else is given -> weights of three decisions with PROBABILITIES, worked by hand.
FACTORS_BY_HAND = {
    "dft": ({"dft_power": 1.0}, {}, [0.5, 0.25, 0.01]),
    "dft_floor": ({"dft_power": 2.0, "dft_floor": 0.1}, {}, [0.25, 0.0625, 0.01]),
    "dft_reference": (
        {"dft_power": 1.0, "dft_policy": "reference", "dft_floor": 0.25},
        {"reference_logprobs": torch.tensor([0.3, 0.4, 0.2]).log()},
        [0.3, 0.4, 0.25],
    ),
    "entropy": (
        {"entropy_power": 2.0},
        {"entropy": math.log(20) * torch.tensor([0.5, 1.0, 3.0])},
        [0.25, 1.0, 1.0],
    ),
    # 0.25 has fallen by log 2 = 0.69, 0.01 by log 50 = 3.9
    "floor_behavior": ({"negative_floor": 0.7}, {"reward": torch.tensor([-1.0])}, [1.0, 1.0, 0.0]),
    "floor_reference": (
        {"negative_floor": 0.6},
        {"reward": torch.tensor([-0.1]), "reference_logprobs": torch.tensor([0.5, 0.5, 0.011]).log()},
        [1.0, 0.0, 1.0],
    ),
    "floor_of_a_good_one": ({"negative_floor": 0.1}, {"reward": torch.tensor([0.0])}, [1.0, 1.0, 1.0]),
    "floor_per_token": (
        {"negative_floor": 0.6},
        {"reward": torch.tensor([-1.0, 1.0, -1.0])},
        [1.0, 1.0, 0.0],
    ),
    "all": (
        {"dft_power": 1.0, "entropy_power": 1.0, "negative_floor": 0.7},
        {"reward": torch.tensor([-1.0]), "entropy": math.log(20) * torch.tensor([0.5, 0.5, 0.5])},
        [0.25, 0.125, 0.0],
    ),
}


@pytest.mark.parametrize(("settings", "given", "expected"), FACTORS_BY_HAND.values(), ids=FACTORS_BY_HAND)
def test_a_factor_by_hand(settings, given, expected):
    lb = torch.tensor([0.5, 0.5, 0.5]).log()
    weights, stats = importance_weights(
        PROBABILITIES.log(),
        lb,
        torch.ones(3).bool(),
        torch.tensor([0, 3]),
        PearConfig(variant="none", **settings),
        **given,
    )
    expected = torch.tensor(expected)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(stats["weight"], torch.stack([expected.sum(), torch.tensor(3.0)]))
    effective = expected.sum() ** 2 / (3 * expected.square().sum())
    torch.testing.assert_close(stats["effective_sample_size"], torch.stack([effective, torch.tensor(1.0)]))


FACTORS = {"dft_power": 0.5, "dft_floor": 0.2, "entropy_power": 0.7, "negative_floor": 0.3}
REFERENCE = {"ratio": "reference"}


def with_factors(config: PearConfig, **more: Any) -> PearConfig:
    return PearConfig(**(config.model_dump() | FACTORS | more))


def others(pack: Pack) -> dict[str, Tensor]:
    """What factors and reference ratios look at; trajectories 1 and 3 are negative, and 3 has stopped altogether."""
    start, end = pack.cu_seqlens[3:5].tolist()
    reference_logprobs = pack.behavior_logprobs + 0.3 * torch.randn(len(pack.mask)) - 0.8
    reference_logprobs[start:end] = pack.logprobs[start:end] + 0.31
    return {
        "reference_logprobs": reference_logprobs.clamp_max(0.0).where(pack.mask, NAN),
        "reward": torch.tensor([1.0, -0.5, 0.0, -1.0, 2.0]),
        "entropy": (4 * torch.rand(len(pack.mask))).where(pack.mask, NAN),
    }


def factor_pack() -> Pack:
    pack = make_pack([16, 40, 8, 8, 24], spread=0.3)
    pack.logprobs -= 1.0
    return pack


def float64_weights(pack: Pack, given: dict[str, Tensor], config: PearConfig):
    per_token = given["reward"].repeat_interleave(pack.cu_seqlens.diff())
    lp, lb, mask, cu = pack.inputs()
    factor = reference.weight_factor(lp, lb, config, per_token, given["entropy"], given["reference_logprobs"])
    base = given["reference_logprobs"] if config.ratio == "reference" else lb
    weights, stats = reference.weights(lp, base, mask, cu, config, factor)
    negative = mask & (per_token < 0)
    fallen = lp.double() < given["reference_logprobs"].double() - config.negative_floor
    return weights, stats | {"negative_stopped": (int((negative & fallen).sum()), int(negative.sum()))}


@pytest.mark.parametrize("ratio", ["behavior", "reference"])
@pytest.mark.parametrize("config", [*CONFIGS, SEQUENCE_MEAN], ids=config_id)
def test_factors_and_reference_ratios_equal_the_reference(config, ratio):
    if config.variant == "none" and ratio == "reference":
        pytest.skip("no ratios: PearConfig refuses it")
    pack = factor_pack()
    given, config = others(pack), with_factors(config, ratio=ratio)
    weights, stats = importance_weights(*pack.inputs(), config, **given)
    expected, expected_stats = float64_weights(pack, given, config)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)
    assert not weights[64:72].any()  # stopped altogether
    assert stats.keys() == expected_stats.keys()
    assert 8 * 0.5 < expected_stats["negative_stopped"][0] < expected_stats["negative_stopped"][1]
    for name, value in stats.items():
        wanted = torch.tensor(expected_stats[name], dtype=torch.float64)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)


def test_settings_of_factors_that_change_nothing_change_no_bit():
    pack = factor_pack()
    plain, stats = importance_weights(*pack.inputs(), PearConfig())
    for more in ({"negative_floor": 0.1}, {"dft_power": 0.0}):
        weights, others_stats = importance_weights(*pack.inputs(), PearConfig(**more))
        assert torch.equal(weights, plain)
        assert all(torch.equal(others_stats[name], value) for name, value in stats.items())


@pytest.mark.parametrize("normalize", ["none", "sequence"])
def test_a_pack_that_has_stopped_altogether_weighs_0_and_is_no_nan(normalize):
    pack = make_pack([9, 5], decisions=1.0)
    pack.logprobs -= 5.0
    config = PearConfig(negative_floor=1.0, normalize=normalize)
    weights, stats = importance_weights(*pack.inputs(), config, reward=-torch.ones(2))
    assert not weights.any()
    assert stats["weight"].tolist() == [0.0, 14.0]
    assert stats["effective_sample_size"].tolist() == [0.0, 2.0]
    assert stats["negative_stopped"].tolist() == [14.0, 14.0]


@pytest.mark.parametrize("lp", [-1e4, -1e38, -INF])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_no_factor_overflows(floor, lp):
    config = PearConfig(variant="none", dft_power=50.0, dft_floor=floor, entropy_power=9.0)
    inputs = (torch.full((2,), lp), torch.zeros(2), torch.ones(2).bool(), torch.tensor([0, 2]))
    weights, _ = importance_weights(*inputs, config, entropy=torch.tensor([-1e-7, 1e30]))
    torch.testing.assert_close(weights, torch.tensor([0.0, floor**50]), rtol=1e-4, atol=0)


def test_a_nan_stays_visible_through_the_factors():
    pack = make_pack([6], decisions=1.0)
    pack.logprobs[2] = NAN
    entropy = torch.ones(6)
    entropy[4] = NAN
    config = PearConfig(variant="none", dft_power=1.0, dft_floor=0.1, entropy_power=1.0, negative_floor=50.0)
    weights, _ = importance_weights(*pack.inputs(), config, entropy=entropy, reward=-torch.ones(1))
    assert weights.isnan().tolist() == [False, False, True, False, True, False]


def test_reference_ratios_need_no_behaviour_logprobs():
    pack = factor_pack()
    given, config = others(pack), with_factors(PearConfig(), ratio="reference")
    lp, lb, mask, cu = pack.inputs()
    expected, _ = importance_weights(lp, lb, mask, cu, config, **given)
    weights, _ = importance_weights(lp, None, mask, cu, config, **given)
    assert torch.equal(weights, expected)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (
            REFERENCE,
            {"reference_logprobs": None},
            "ratio 'reference' needs reference_logprobs.*--as reference",
        ),
        (
            {"dft_power": 1.0, "dft_policy": "reference"},
            {"reference_logprobs": None},
            "dft_policy 'reference' needs reference_logprobs.*dft_policy 'target' does without",
        ),
        (
            {"variant": "none", "negative_floor": 1.0},
            {"reference_logprobs": None, "behavior_logprobs": None},
            "negative_floor 1 needs to know where.*give reference_logprobs or behavior_logprobs, or leave",
        ),
        (
            {"entropy_power": 2.0},
            {"entropy": None},
            "entropy_power 2 needs entropy.*entropy_power 0 does without",
        ),
        (
            {"entropy_power": 1.0},
            {"entropy": torch.ones(3)},
            r"entropy has shape \(3,\) and logprobs \(96,\)",
        ),
        (
            REFERENCE,
            {"reference_logprobs": torch.zeros(3)},
            r"reference_logprobs has shape \(3,\) and logprobs",
        ),
        (
            {},
            {"reference_logprobs": torch.zeros(96).bfloat16()},
            "reference_logprobs are bfloat16, which is too coarse",
        ),
        (
            {},
            {"reference_logprobs": torch.zeros(96, requires_grad=True)},
            "reference_logprobs require a gradient, but the initial model is fixed",
        ),
        ({}, {"reference_logprobs": torch.zeros(96, device="meta")}, "reference_logprobs is on meta"),
        ({"negative_floor": 1.0}, {"reward": torch.ones(7)}, "reward has 7 entries; give one per trajectory"),
    ],
)
def test_what_factors_and_reference_ratios_need_is_named(settings, change, message):
    pack = factor_pack()
    inputs = {**vars(pack), **others(pack), **change}
    with pytest.raises(ValueError, match=message):
        importance_weights(**inputs, config=PearConfig(**settings))


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.1])
@pytest.mark.parametrize(
    "settings",
    [REFERENCE, {"negative_floor": 1.0}, {"dft_power": 1.0, "dft_policy": "reference"}],
    ids=["ratio", "floor", "dft"],
)
def test_a_reference_logprob_that_is_none_is_refused_with_its_place(settings, value):
    pack = make_pack([6, 5], decisions=1.0)
    bad = pack.behavior_logprobs.clone()
    bad[[2, 7]] = value
    pack.mask[2] = False  # where anything may stand
    given = {"reference_logprobs": bad, "reward": torch.ones(2)}
    message = (
        f"reference_logprobs are no log-probabilities on 1 of 10 decisions, first at token 7 of.*: {value:g}"
    )
    with pytest.raises(ValueError, match=message):
        importance_weights(*pack.inputs(), PearConfig(**settings), **given)
    importance_weights(*pack.inputs(), PearConfig(), **given)  # where nothing looks at them


LAYOUT_CONFIGS = [
    with_factors(PearConfig(), ratio="reference"),
    with_factors(PearConfig(variant="block", normalize="sequence")),
    with_factors(SEQUENCE_MEAN),
    with_factors(PearConfig(variant="none"), dft_policy="reference"),
    with_factors(PearConfig(control="shuffled"), entropy_power=0.0),
]
SOURCES = {"source": torch.tensor([1, 0, 1, 0, 2]), "num_sources": 4}


def factored_weights_of_a_shard(rank: int, pack: Pack, given: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    group = torch.distributed.group.WORLD
    cu, ranks = pack.cu_seqlens, group.size()
    shard = [zigzag(x, cu, rank, ranks) for x in pack.inputs()[:3]]
    own = {name: x if name == "reward" else zigzag(x, cu, rank, ranks) for name, x in given.items()}
    return [
        weights_and_statistics(*shard, cu, config, **own, **SOURCES, cp_group=group)
        for config in LAYOUT_CONFIGS
    ]


def test_factors_over_zigzag_ranks_equal_one_rank_bit_for_bit():
    pack = factor_pack()
    given = others(pack)
    by_rank = run_ranks(2, factored_weights_of_a_shard, pack, given)
    for i, config in enumerate(LAYOUT_CONFIGS):
        weights, *stats = weights_and_statistics(*pack.inputs(), config, **given, **SOURCES)
        for rank, results in enumerate(by_rank):
            assert torch.equal(results[i][0], zigzag(weights, pack.cu_seqlens, rank, 2))
        for k, value in enumerate(stats, 1):
            assert torch.equal(sum(results[i][k] for results in by_rank), value)


@pytest.mark.parametrize("config", LAYOUT_CONFIGS[:4], ids=config_id)
def test_the_statistics_of_a_source_are_those_of_its_trajectories_alone(config):
    pack = factor_pack()
    given = others(pack)
    _, stats, by_source = weights_and_statistics(*pack.inputs(), config, **given, **SOURCES)
    torch.testing.assert_close(by_source.sum(0), stats)
    of_token = SOURCES["source"].repeat_interleave(pack.cu_seqlens.diff())
    mask = pack.mask
    for s in range(4):
        pack.mask = mask & (of_token == s)
        _, alone, _ = weights_and_statistics(*pack.inputs(), config, **given)
        assert torch.equal(by_source[s], alone)


def error_of_a_bad_reference(rank: int) -> str:
    pack = make_pack([8, 8], decisions=1.0)
    group = torch.distributed.group.WORLD
    bad = torch.zeros(16)
    bad[0] = NAN  # in the first rank's shard alone
    shard = [zigzag(x, pack.cu_seqlens, rank, 2) for x in (*pack.inputs()[:3], bad)]
    try:
        importance_weights(
            *shard[:3], pack.cu_seqlens, PearConfig(**REFERENCE), reference_logprobs=shard[3], cp_group=group
        )
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_bad_reference_logprob_is_an_error_on_every_rank():
    for message in run_ranks(2, error_of_a_bad_reference):
        assert "first at token 0 of the pack" in message


def test_under_control_every_decision_keeps_its_own_factor():
    pack = factor_pack()
    given = others(pack)
    plain, _ = importance_weights(*pack.inputs(), PearConfig())
    config = with_factors(PearConfig(control="shuffled"), entropy_power=0.0)
    weights, stats = importance_weights(*pack.inputs(), config, **given)
    alone, _ = importance_weights(*pack.inputs(), PearConfig(control="shuffled"))
    expected, expected_stats = importance_weights(
        *pack.inputs(), with_factors(PearConfig(), entropy_power=0.0), **given
    )
    factor = (expected / plain).where(pack.mask, 0.0)
    torch.testing.assert_close(weights, alone * factor)
    assert all(torch.equal(stats[name], value) for name, value in expected_stats.items())
