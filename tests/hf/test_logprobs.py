"""A loaded model computes what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.hf.models import LONG, MODELS, hf_logprobs, tokens_for
from tests.hf.ranks import rank_logprobs

LAYOUTS = [(1, 1), (2, 1), (1, 2)]


@pytest.fixture(scope="module")
def ours(hf_models: dict[str, Path], converted: dict[str, Path]) -> dict[tuple[str, int, int], torch.Tensor]:
    """Log-probs by name, TP and PP, as the last rank of a world of two has them."""
    cases = {name: (folder, tokens_for(name)) for name, folder in hf_models.items()}
    cases["converted"] = converted["qwen3"], tokens_for("qwen3")
    return run_ranks(2, rank_logprobs, cases, LAYOUTS)[-1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_logprobs_are_those_of_transformers_on_every_layout(
    ours: dict[tuple[str, int, int], torch.Tensor], hf_models: dict[str, Path], name: str, tp: int, pp: int
) -> None:
    expected = hf_logprobs(hf_models[name], tokens_for(name))
    torch.testing.assert_close(ours[name, tp, pp], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_a_converted_checkpoint_is_the_same_model_on_every_layout(
    ours: dict[tuple[str, int, int], torch.Tensor], tp: int, pp: int
) -> None:
    assert torch.equal(ours["converted", tp, pp], ours["qwen3", tp, pp])


@pytest.mark.parametrize("name", ["llama3", "qwen2-yarn", "qwen3-yarn"])
def test_rope_scaling_is_that_of_transformers_where_it_shows(
    hf_models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """At twice the original length of YaRN's models."""
    folder, tokens = hf_models[name], tokens_for(name, LONG)
    found = run_ranks(1, rank_logprobs, {name: (folder, tokens)}, [(1, 1)])[0][name, 1, 1]
    expected = hf_logprobs(folder, tokens)
    unscaled = tmp_path / "unscaled"
    unscaled.mkdir()
    (unscaled / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (unscaled / "config.json").write_text(json.dumps(config))
    assert (hf_logprobs(unscaled, tokens) - expected).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
