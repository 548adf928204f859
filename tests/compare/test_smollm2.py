"""The whole chain on a real model without a GPU: score, offline phase, export, evaluation, GRPO, evaluation."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("trl", reason="needs the extra rl")
pytest.importorskip("reasoning_gym", reason="needs the extra rl")
pytest.importorskip("scipy", reason="needs the extra eval")

from tests.compare import tiny
from tests.compare.tiny import RECIPES
from tests.megatron.runs import metrics

pytestmark = pytest.mark.slow

_ROOM = 12 * 10**9  # bytes: three folders with an optimizer's state, and four without


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for the checkpoints, which do not stay."""
    if shutil.disk_usage(tmp_path).free < _ROOM:
        pytest.skip(f"needs {_ROOM // 10**9} GB in {tmp_path}")
    yield tmp_path
    shutil.rmtree(tmp_path)


def write_recipe(folder: Path, smollm2: Path) -> Path:
    """PEAR or nothing before GRPO, on puzzles; {prepared} holds dialogues that SmolLM2 itself has scored."""
    score = f"python -m pear_megatron.cli score --model {smollm2} --data {folder / 'dialogues.jsonl'}"
    values = {
        "output_dir": str(folder / "out"),
        "prepare": [f"{score} --output {{prepared}}/scored.parquet"],
        "seeds": [0],
        "offline": {
            "recipe": str(RECIPES / "sft" / "puzzles.yaml"),
            "overrides": [
                f"model.hf={smollm2}",
                "data.train={prepared}/scored.parquet",
                "data.seq_length=96",
                "parallel.tensor_model_parallel_size=1",
                "train.max_steps=5",
                "train.global_batch_size=2",
            ],
        },
        "rl": {
            "recipe": str(RECIPES / "grpo_trl" / "puzzles.yaml"),
            "overrides": [
                "grpo.max_num_steps=2",
                "grpo.num_prompts_per_step=2",
                "grpo.num_generations_per_prompt=2",
                "policy.precision=float32",
                "policy.generation.max_new_tokens=16",
                "data.train.size=8",
                "data.validation.size=4",
                "checkpointing.save_period=2",
            ],
        },
        "eval": {"num_samples": 1, "k": [1]},
        "arms": {"no offline phase": None, "token": ["pear.variant=token"]},
        "baseline": "no offline phase",
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_offline_export_grpo_and_evaluations_on_a_real_model(folder: Path, smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    from examples.puzzles import problems
    from pear_megatron.megatron.checkpoint.model_folder import read_model_facts
    from pear_megatron.rl.trl.recipe import load_trl_recipe

    held_out = load_trl_recipe(RECIPES / "grpo_trl" / "puzzles.yaml").data.validation
    assert held_out is not None
    problems.write_dialogues(folder / "dialogues.jsonl", problems.training(12), held_out)
    tiny.compare(write_recipe(folder, smollm2))
    token, nothing = (folder / "out" / "seed0" / name for name in ("token", "no-offline-phase"))

    offline = metrics(token / "run")
    assert [row["step"] for row in offline] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(row[key]) for row in offline for key in ("loss", "nll", "grad_norm"))
    ratios = [abs(row["pear/log_ratio"]) for row in offline]
    assert ratios[0] < 1e-4  # scored by the model that training starts from: two implementations agree
    assert ratios[-1] > 1e-3
    assert offline[0]["pear/weight"] == pytest.approx(1.0, abs=0.02)  # gamma 0.999 over a short answer

    AutoModelForCausalLM.from_pretrained(token / "export")
    digests = [read_model_facts(path).digest for path in (token / "export", smollm2)]
    assert digests[0] != digests[1]
    for cell, start in zip((token, nothing), digests, strict=True):
        steps = metrics(cell / "rl")
        assert [row["step"] for row in steps] == [1, 2]
        assert all(0.0 <= row["reward"] <= 1.0 and row["completion_length"] <= 16 for row in steps)
        assert [row["problems"] for row in steps] == [row["problems"] for row in metrics(token / "rl")]
        assert yaml.safe_load((cell / "rl" / "config.yaml").read_text())["weights"] == start
        settings = [json.loads((cell / name / "settings.json").read_text()) for name in ("before", "after")]
        assert settings[0]["weights"] == start
        assert settings[1]["weights"] == read_model_facts(cell / "rl" / "final").digest
        assert settings[0]["problems"] == settings[1]["problems"]
        asked = [[row["id"] for row in rows(cell / name / "samples.jsonl")] for name in ("before", "after")]
        assert sorted(asked[0]) == sorted(asked[1])
        assert len(set(asked[0])) == 4

    content = tiny.results(folder)
    assert content["arms"]["token"]["against_baseline"].keys() == {
        "before/pass@1", "after/pass@1", "take_off", "mean_reward",
    }  # fmt: skip
