"""Mixtures of experts: transformers' log-probs on TP x EP x PP, and every bit there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pear_megatron.errors import RecipeError
from pear_megatron.hf.config_file import config_json
from pear_megatron.megatron.checkpoint.export import export_checkpoint
from pear_megatron.recipe import ModelConfig
from pear_megatron.recipe.hf_config import UnsupportedArchitecture, model_keys
from tests.distributed import run_ranks
from tests.hf.models import MIXTURES, hf_logprobs, save_model, tokens_for
from tests.hf.ranks import rank_convert, rank_logprobs
from tests.hf.test_round_trip import assert_same_bits

LAYOUTS = {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)], 4: [(2, 1, 2), (1, 2, 2), (2, 2, 2)]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers", reason="needs the extra hf")
    root = tmp_path_factory.mktemp("mixtures")
    return {name: save_model(name, root / name) for name in MIXTURES}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_logprobs_are_those_of_transformers_on_every_layout(folders: dict[str, Path], ranks: int) -> None:
    cases = {name: (folder, tokens_for(name)) for name, folder in folders.items()}
    found = run_ranks(ranks, rank_logprobs, cases, LAYOUTS[ranks])[-1]
    assert len(found) == len(cases) * len(LAYOUTS[ranks])
    for (name, *_sizes), logprobs in found.items():
        expected = hf_logprobs(folders[name], tokens_for(name))
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 2), (2, 2, 2)], ids=["1", "EP2", "TP2xPP2xEP2"])
def test_every_bit_comes_back(folders: dict[str, Path], tmp_path: Path, layout: tuple[int, int, int]) -> None:
    tp, pp, ep = layout
    run_ranks(max(tp * pp, ep), rank_convert, folders, tmp_path, tp, pp, ep)
    for name, folder in folders.items():
        export_checkpoint(tmp_path / name, tmp_path / f"{name}-out")
        assert_same_bits(tmp_path / f"{name}-out", folder)
        tokens = tokens_for(name)
        assert torch.equal(hf_logprobs(tmp_path / f"{name}-out", tokens), hf_logprobs(folder, tokens))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_config_of_our_own_is_read_back_as_the_same_model(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    keys = model_keys(folders[name])
    made = config_json(ModelConfig.model_validate(keys), "fp32", tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps(made))
    unused = {"ffn_hidden_size"}  # of a mixture, by its layers
    again = model_keys(tmp_path)
    assert {k: v for k, v in again.items() if k not in unused} == {
        k: v for k, v in keys.items() if k not in unused
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        ({"architectures": ["OlmoeForCausalLM"]}, "OlmoeForCausalLM"),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3ForCausalLM"),
    ],
)
def test_what_megatron_core_would_compute_otherwise_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, object], said: str
) -> None:
    config = json.loads((folders["qwen3-moe"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedArchitecture if "architectures" in change else RecipeError) as raised:
        model_keys(tmp_path)
    assert said in str(raised.value)
    assert str(tmp_path / "config.json") in str(raised.value)
