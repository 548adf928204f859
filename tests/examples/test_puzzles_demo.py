"""The main job on real input, end to end: a real model scored, inspected, trained at TP = 3, exported, evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.megatron.runs import metrics
from tests.smollm2 import smollm2_folder


@pytest.mark.slow
def test_twenty_steps_on_a_real_model_lower_its_loss_and_the_export_generates(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("scipy")
    from examples.puzzles.demo import demo

    (tmp_path / "smollm2").symlink_to(smollm2_folder())
    small = ("train.global_batch_size=1", "data.seq_length=96")  # one or two dialogues a step
    demo(tmp_path, num_puzzles=16, num_held_out=4, steps=20, overrides=small)

    rows = metrics(tmp_path / "run")
    assert len(rows) == 20
    assert abs(rows[0]["pear/log_ratio"]) < 1e-4  # scored by the model that training starts from
    assert sum(row["loss"] for row in rows[-5:]) < 0.5 * sum(row["loss"] for row in rows[:5])
    assert rows[-1]["nll"] < 0.5 * rows[0]["nll"]
    assert "<svg" in (tmp_path / "inspect.html").read_text()
    for name in ("before", "after"):
        samples = (tmp_path / "eval" / name / "samples.jsonl").read_text().splitlines()
        assert len(samples) == 16
    assert any("answer is" in json.dumps(json.loads(line)) for line in samples)
