"""Convert and export give a Hugging Face checkpoint back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pear_megatron.cli import app
from pear_megatron.megatron.checkpoint.export import export_checkpoint
from pear_megatron.recipe import RecipeError
from tests.distributed import run_ranks
from tests.hf.models import MODELS, hf_logprobs, tokens_for


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(folder: Path, source: Path) -> None:
    found, expected = tensors_of(folder), tensors_of(source)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def rank_export(rank: int, checkpoint: Path, output: Path, max_shard_size: int) -> None:
    export_checkpoint(checkpoint, output, max_shard_size=max_shard_size)


@pytest.mark.parametrize("name", MODELS)
def test_export_gives_back_every_tensor_bit_for_bit(
    hf_models: dict[str, Path], converted: dict[str, Path], tmp_path: Path, name: str
) -> None:
    export_checkpoint(converted[name], tmp_path / "out")
    assert_same_bits(tmp_path / "out", hf_models[name])
    tokens = tokens_for(name)
    assert torch.equal(hf_logprobs(tmp_path / "out", tokens), hf_logprobs(hf_models[name], tokens))


def test_an_export_does_not_replace_the_runs_own_tokenizer(converted: dict[str, Path]) -> None:
    root = converted["qwen3"]
    with pytest.raises(RecipeError, match=r"hf is where the run keeps its tokenizer.*export"):
        export_checkpoint(root, root / "hf")


def test_export_in_shards_shared_by_ranks_gives_the_same(
    hf_models: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    out, largest = tmp_path / "out", 40_000
    run_ranks(2, rank_export, converted["qwen3"], out, largest)
    assert_same_bits(out, hf_models["qwen3"])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    tensors = tensors_of(out)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in tensors.values())
    for file in files:
        sizes = [
            tensors[n].numel() * tensors[n].itemsize for n, f in index["weight_map"].items() if f == file
        ]
        assert sum(sizes) <= largest or len(sizes) == 1
    tokens = tokens_for("qwen3")
    assert torch.equal(hf_logprobs(out, tokens), hf_logprobs(hf_models["qwen3"], tokens))


def test_export_casts_and_says_so(converted: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_checkpoint(converted["qwen2"], tmp_path / "out", precision="bf16")
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_export_refuses_a_folder_in_use_and_replaces_it_when_told(
    converted: dict[str, Path], hf_models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = ["export", "--checkpoint", str(converted["qwen2"]), "--output", str(out)]
    out.mkdir()
    (out / "precious.txt").write_text("x")
    refused = CliRunner().invoke(app, run)
    assert refused.exit_code == 1
    assert "is not empty; name a new folder" in refused.stderr
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    kept = CliRunner().invoke(app, [*run, "--overwrite"])
    assert kept.exit_code == 1
    assert "holds more than an earlier export or conversion (precious.txt, ...)" in kept.stderr
    (out / "precious.txt").rename(out / "config.json")  # as an earlier export has one
    (out / "old.safetensors").touch()
    assert CliRunner().invoke(app, [*run, "--overwrite"]).exit_code == 0
    assert not (out / "old.safetensors").exists()
    assert_same_bits(out, hf_models["qwen2"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "--hf", "{}/nothing", "--output", "{}/out"], "no Hugging Face checkpoint at"),
        (["convert", "--hf", "{}/olmoe", "--output", "{}/out"], "Megatron-Bridge.*not installed here"),
        (["export", "--checkpoint", "{}/nothing", "--output", "{}/out"], "no checkpoint at"),
        (["export", "--checkpoint", "{}", "--output", "{}/out", "--hf", "{}"], "no checkpoint at"),
        (
            ["export", "--checkpoint", "{}/bridge", "--output", "{}/out"],
            "checkpoint of Megatron-Bridge.*--hf SOURCE",
        ),
        (
            ["export", "--checkpoint", "{}/bridge", "--output", "{}/out", "--hf", "{}/olmoe"],
            "bridge is a checkpoint of Megatron-Bridge.*not installed here",
        ),
        (
            ["export", "--checkpoint", "{}", "--output", "{}/out", "--max-shard-size", "5 apples"],
            "is no size",
        ),
    ],
)
def test_commands_say_what_is_wrong(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "olmoe").mkdir()
    (tmp_path / "olmoe" / "config.json").write_text('{"architectures": ["OlmoeForCausalLM"]}')
    (tmp_path / "bridge").mkdir()
    for name in ("metadata.json", ".metadata", "run_config.yaml"):
        (tmp_path / "bridge" / name).write_text("{}")
    result = CliRunner().invoke(app, [argument.format(tmp_path) for argument in arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.slow
def test_both_commands_start_their_own_processes(hf_models: dict[str, Path], tmp_path: Path) -> None:
    command, layout = [sys.executable, "-m", "pear_megatron.cli"], ["--tensor-parallel", "2"]
    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "out")
    for arguments in (
        ["convert", "--hf", str(hf_models["qwen3"]), "--output", checkpoint, *layout],
        ["export", "--checkpoint", checkpoint, "--output", out, "--max-shard-size", "50KB", *layout],
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == (1 if arguments[0] == "convert" else 2)  # rank 0 alone speaks
    assert_same_bits(tmp_path / "out", hf_models["qwen3"])
