"""What inspect draws from the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pear_megatron.data import DataConfig
from pear_megatron.inspect.sample import draw
from tests.structured import make_rows, write_rows


@pytest.mark.parametrize("with_reference", [True, False])
def test_reference_log_probs_are_drawn_where_the_rows_have_them(with_reference: bool, tmp_path: Path) -> None:
    rows = make_rows(8)
    for row in rows if with_reference else ():
        row["reference_logprobs"] = row["behavior_logprobs"]
    config = DataConfig(train=[str(write_rows(tmp_path / "a.jsonl", rows))], seq_length=128)
    options = {"vocab_size": None, "max_trajectories": 5, "seed": 0, "progress": False}
    for trajectory in draw(config, require_behavior_logprobs=True, **options).trajectories:
        if with_reference:
            assert not isinstance(trajectory.reference_logprobs, np.memmap)
            np.testing.assert_array_equal(trajectory.reference_logprobs, trajectory.behavior_logprobs)
        else:
            assert trajectory.reference_logprobs is None
