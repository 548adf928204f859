"""PearConfig: what it takes, what it refuses, and what it says then."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from pear_megatron import PearConfig


def test_defaults_are_the_papers():
    assert PearConfig().model_dump() == {
        "variant": "token",
        "gamma": 0.999,
        "block_size": 4,
        "log_ratio_clip": (-0.08, 0.3),
        "log_weight_clip": (-10.0, 5.0),
        "baseline": "none",
        "normalize": "none",
        "negative_scale": 1.0,
        "control": "none",
        "negative_floor": None,
        "ratio": "behavior",
        "sequence_scale": "sum",
        "tau": 1.0,
        "base_loss": "nll",
        "kl_weight": 1.0,
        "kl_tail": "none",
        "dft_power": 0.0,
        "dft_floor": 0.0,
        "dft_policy": "target",
        "entropy_power": 0.0,
        "report_entropy": False,
    }


def test_lists_and_numbers_from_yaml_are_taken():
    config = PearConfig(
        log_ratio_clip=[-1, 1], log_weight_clip=[-5, 80], gamma=1, block_size=1, negative_scale=0
    )
    assert config.log_ratio_clip == (-1.0, 1.0)
    assert config.log_weight_clip == (-5.0, 80.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gama": 0.9}, "unknown key 'gama'; did you mean 'gamma'?"),
        ({"blocksize": 2}, "unknown key 'blocksize'; did you mean 'block_size'?"),
        ({"ratio_clip": (0, 1)}, "unknown key 'ratio_clip'; did you mean 'log_ratio_clip'?"),
        ({"zzz": 1}, "unknown key 'zzz'; known keys: variant, gamma, block_size, log_ratio_clip"),
        ({"variant": "suffix"}, "Input should be 'token', 'block', 'own', 'sequence' or 'none'"),
        ({"gamma": 0.0}, "Input should be greater than 0"),
        ({"gamma": 1.001}, "Input should be less than or equal to 1"),
        ({"gamma": float("nan")}, "Input should be a finite number"),
        ({"block_size": 0}, "Input should be greater than or equal to 1"),
        ({"block_size": 2.5}, "Input should be a valid integer"),
        ({"baseline": "mean"}, "Input should be 'none' or 'sequence_mean'"),
        ({"normalize": "batch"}, "Input should be 'none' or 'sequence'"),
        ({"negative_scale": -0.1}, "Input should be greater than or equal to 0"),
        ({"control": "shuffle"}, "Input should be 'none', 'shuffled' or 'shuffled_by_place'"),
        (
            {"log_ratio_clip": (0.3, -0.08)},
            "log_ratio_clip must be (low, high) with low < high, got (0.3, -0.08)",
        ),
        ({"log_ratio_clip": (0.3,)}, "Field required"),
        ({"log_ratio_clip": (0.92, 1.35)}, "does not contain 0, the logarithm of a ratio of 1"),
        ({"log_ratio_clip": (0.08, 0.3)}, "the lower one is below 0"),
        (
            {"log_weight_clip": (1.0, 1.0)},
            "log_weight_clip must be (low, high) with low < high, got (1.0, 1.0)",
        ),
        ({"log_weight_clip": (-10.0, float("inf"))}, "Input should be a finite number"),
        (
            {"log_weight_clip": (-10.0, 100.0)},
            "the upper bound 100.0 overflows float32 after exp; use at most 80",
        ),
        (
            {"log_weight_clip": (-100.0, 5.0)},
            "the lower bound -100.0 underflows float32 after exp; use at least -80",
        ),
    ],
)
def test_bad_settings_are_named_with_the_way_out(settings, message):
    with pytest.raises(ValueError) as caught:
        PearConfig(**settings)
    assert message in str(caught.value)
    assert next(iter(settings)) in str(caught.value)


def test_sequence_weights_are_not_to_be_normalised_away():
    with pytest.raises(
        ValueError, match="makes every weight 1; use normalize='none', or variant='token' or 'block'"
    ):
        PearConfig(variant="sequence", normalize="sequence")


def test_weights_that_are_all_one_are_not_to_be_shuffled():
    with pytest.raises(ValueError, match="control='shuffled' moves weights around.*or control='none'"):
        PearConfig(variant="none", control="shuffled")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_scale": "mean"}, "used with variant='sequence' alone, and variant is 'token'"),
        ({"variant": "sequence", "tau": 2.0}, "used with sequence_scale='mean' alone"),
        ({"kl_weight": 0.5}, "used with base_loss='kl' alone, and base_loss is 'nll'"),
        ({"kl_tail": "bucket"}, "used with base_loss='kl' alone"),
        ({"dft_floor": 0.1}, "dft_floor is used with dft_power alone, which is 0"),
        ({"dft_policy": "reference"}, "dft_policy is used with dft_power alone, which is 0"),
        ({"base_loss": "kl", "dft_power": 1.0}, "kl_weight=1 has none; set kl_weight below 1"),
        ({"variant": "none", "ratio": "reference"}, "with variant='none' all of them are 1"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PearConfig(**settings)


def test_a_config_is_frozen_and_hashable():
    config = PearConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.gamma = 0.5
    assert config == PearConfig()
    assert hash(config) == hash(PearConfig())
