"""Settings that do nothing on a run's data are said once, before it begins."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from pear_megatron import PearConfig
from pear_megatron.train.announce import announce_idle_settings


@pytest.mark.parametrize(
    ("settings", "rewards", "said"),
    [
        (
            {"negative_floor": 2.0, "negative_scale": 0.5},
            [1.0, 0.0],
            ["negative_floor=2", "negative_scale=0.5"],
        ),
        ({"negative_floor": 2.0, "negative_scale": 0.5}, [1.0, -0.1], []),
        ({}, [1.0], []),
    ],
)
def test_settings_of_negative_examples_without_any_are_said(settings, rewards, said, caplog):
    with caplog.at_level(logging.WARNING, logger="pear_megatron"):
        announce_idle_settings(PearConfig(**settings), np.array(rewards))
    assert [record.getMessage().split()[0] for record in caplog.records] == [f"pear.{name}" for name in said]
    assert all("no trajectory has a reward below zero" in r.getMessage() for r in caplog.records)
