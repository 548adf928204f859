"""`make demo`, small: every step of it, from the data to the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("trl", reason="needs the extra rl")

from examples.stretches import demo, weigh, world
from pear_megatron import PearConfig
from tests.megatron.runs import REPOSITORY

RECIPES = REPOSITORY / "recipes"
MAKE_DATA = "python -m examples.stretches.make_data --out {prepared}/data --seed {seed}"
BASE = (
    "python -m pear_megatron.train --config recipes/sft/stretches_base.yaml data.train={prepared}/data/base.jsonl "
    "data.tokenizer={prepared}/data/tokenizer output_dir={prepared}/base seed={seed} train.max_steps=2"
)


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo.yaml with little data and few steps, run once."""
    folder = tmp_path_factory.mktemp("demo")
    parent = yaml.safe_load((RECIPES / "compare" / "demo.yaml").read_text())
    small = {
        "defaults": str(RECIPES / "compare" / "demo.yaml"),
        "prepare": [f"{MAKE_DATA} --num-base 128 --num-offline 64 --num-heldout 4", BASE],
        "offline": {
            "recipe": str(RECIPES / "sft" / "stretches.yaml"),
            "overrides": [*parent["offline"]["overrides"], "train.max_steps=2"],
        },
        "rl": {"recipe": str(RECIPES / "grpo_trl" / "stretches.yaml")},
        "eval": {"num_samples": 2, "k": [1, 2]},
    }
    stretches = yaml.safe_load((RECIPES / "compare" / "stretches_base.yaml").read_text())
    small["rl"]["overrides"] = [*stretches["rl"]["overrides"], "grpo.max_num_steps=2"]
    (folder / "small.yaml").write_text(yaml.safe_dump(small))
    demo.main(["--config", str(folder / "small.yaml"), "--output", str(folder / "out")])
    return folder / "out"


def test_the_demo_ends_in_numbers_and_pictures_of_three_arms(small_demo: Path) -> None:
    results = json.loads((small_demo / "results.json").read_text())
    assert list(results["arms"]) == ["SFT", "PEAR token", "PEAR sequence"]
    assert all(len(arm["rewards"][0]) == 2 for arm in results["arms"].values())
    for name in ("curves.png", "seeds.png", "weights_over_positions.png", "weight_distributions.png"):
        assert (small_demo / name).read_bytes()[:4] == b"\x89PNG"
    page = (small_demo / "index.html").read_text()
    assert page.count("<svg") == 2 * 4  # curves, seeds, two of the weights; broad and narrow
    for words in ("<h2>The world</h2>", "Careful stretches in held-out answers", "What PEAR weighs"):
        assert words in page


def test_log_probs_of_the_export_are_those_that_training_reported(small_demo: Path) -> None:
    """The base model's log-probs of what the first offline step saw, and that step's nll at TP = 2."""
    metrics = (small_demo / "seed0" / "sft" / "run" / "metrics.jsonl").read_text().splitlines()
    base = small_demo / "base-export"
    from pear_megatron.megatron.checkpoint.export import export_checkpoint

    export_checkpoint(small_demo / "prepared" / "seed0" / "base", base)
    data = small_demo / "prepared" / "seed0" / "data" / "offline.jsonl"
    logprobs, _, _ = weigh.response_logprobs(base, data, 64)  # all 64 are the first step's batch
    assert -logprobs.mean() == pytest.approx(json.loads(metrics[0])["nll"], rel=1e-4)


def test_weights_of_trajectories_are_those_of_the_method(small_demo: Path) -> None:
    rng = np.random.default_rng(0)
    logprobs = -rng.random((3, world.RESPONSE_LENGTH)).astype(np.float32)
    behavior = np.zeros_like(logprobs)
    weights = weigh.weigh(logprobs, behavior, PearConfig(variant="token"))
    steps = np.clip(logprobs, -0.08, 0.3) + np.log(0.999)
    expected = np.exp(steps[:, ::-1].cumsum(axis=1)[:, ::-1] - steps)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_the_careful_share_reads_the_style_of_answers_cut_short_too(tmp_path: Path) -> None:
    careful = world.sample_answers(
        np.random.default_rng(0), world.sample_problems(np.random.default_rng(1), 1), 1.0
    )
    whole = careful.responses[0].tolist()
    rows = [
        {"id": "a", "tokens": whole},
        {"id": "a", "tokens": whole[:16]},
        {"id": "b", "tokens": [world.END]},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert weigh.careful_shares(tmp_path).tolist() == [0.75, 0.0]
    ends = [world.TOKENS[symbol] for symbol in world.at_ends(careful.responses)[0]]
    problems = [{"id": name, "answer": " ".join(ends)} for name in ("a", "b")]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    # Six careful stretches, all right; of three first stretches the empty answer's is wrong.
    assert weigh.ends_right(tmp_path, tmp_path / "problems.jsonl") == (1.0, pytest.approx(2 / 3))
