"""Negative examples that nothing stops, and settings for them without any, are said once, before a run begins."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from pear_megatron import PearConfig
from pear_megatron.train.announce import announce_rewards

SETTINGS = {"negative_floor": 2.0, "negative_scale": 0.5}
IDLE = "does nothing: no trajectory has a reward below zero"


@pytest.mark.parametrize(
    ("settings", "rewards", "said"),
    [
        (SETTINGS, [1.0, 0.5], [f"pear.negative_floor=2 {IDLE}", f"pear.negative_scale=0.5 {IDLE}"]),
        ({}, [1.0, 0.0, 0.0], ["2 of 3 trajectories have reward 0: they train nothing"]),
        (SETTINGS, [1.0, -0.1], []),
        ({}, [1.0], []),
        (
            {},
            [1.0, -0.1, -1.0],
            ["2 of 3 trajectories have a reward below zero, and nothing stops their push"],
        ),
        ({"negative_scale": 0.0}, [-1.0], []),
    ],
)
def test_what_is_said_of_negative_examples(settings, rewards, said, caplog):
    with caplog.at_level(logging.WARNING, logger="pear_megatron"):
        announce_rewards(PearConfig(**settings), np.array(rewards))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(said)
    assert all(message.startswith(begin) for message, begin in zip(messages, said, strict=True))
