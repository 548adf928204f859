"""convert and export of architectures that only Megatron-Bridge maps: its AutoBridge, on CPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pear_megatron.config import PearConfig
from tests.adapters.one_rank import expected
from tests.adapters.test_bridge import compare, environment, needs_bridge, run
from tests.hf.models import UNMAPPED, hf_logprobs, save_model, save_tokenizer, tokens_for
from tests.megatron.runs import write_trajectories

Q = "model.layers.1.self_attn.q_proj"
pytestmark = needs_bridge


def variant(source: Path, name: str, tensors: Any = None, **config: Any) -> Path:
    """A copy beside a Hugging Face folder, with other tensors or other keys in config.json."""
    folder = Path(shutil.copytree(source, source.with_name(name)))
    if tensors is not None:
        held = load_file(folder / "model.safetensors")
        tensors(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bridge")


@pytest.fixture(scope="module")
def said(work: Path) -> dict[str, Any]:
    """What every command below said, in this order, in one process: Bridge is slow to import."""
    for name in UNMAPPED:
        save_tokenizer(save_model(name, work / name))
    mistral, gemma = work / "mistral", work / "gemma2"
    bias = torch.ones(32, dtype=torch.bfloat16)
    variant(mistral, "missing", lambda held: held.pop(f"{Q}.weight"))
    variant(mistral, "unknown", lambda held: held.update({f"{Q}.bias": bias}))
    variant(gemma, "narrower", dtype="bfloat16")
    variant(mistral, "olmo", architectures=["OlmoForCausalLM"], model_type="olmo")
    commands: dict[str, list[object]] = {}
    for name in UNMAPPED:
        commands[f"convert {name}"] = ["convert", "--hf", work / name, "--output", work / f"{name}-bridge"]
        commands[f"export {name}"] = [
            "export", "--checkpoint", work / f"{name}-bridge", "--hf", work / name, "--output", work / f"{name}-back"
        ]  # fmt: skip
    for name in ("missing", "unknown", "narrower", "olmo"):
        commands[name] = ["convert", "--hf", work / name, "--output", work / f"{name}-bridge"]
    bridge, back = work / "mistral-bridge", ["--output", work / "nothing"]
    commands |= {
        "again": [*commands["convert mistral"], "--overwrite"],
        "one checkpoint": [
            "export", "--checkpoint", bridge / "iter_0000000", "--hf", mistral, "--output", work / "one"
        ],
        "without --hf": ["export", "--checkpoint", bridge, *back],
        "another --hf": ["export", "--checkpoint", bridge, "--hf", gemma, *back],
        "no --hf": ["export", "--checkpoint", bridge, "--hf", work / "absent", *back],
        "no checkpoint": ["export", "--checkpoint", work / "absent", "--hf", mistral, *back],
        "into --hf": ["export", "--checkpoint", bridge, "--hf", mistral, "--output", mistral, "--overwrite"],
        "convert's options": ["convert", "--hf", mistral, *back, "--tensor-parallel", "2", "--dtype", "fp32"],
        "export's options": [
            "export", "--checkpoint", bridge, "--hf", mistral, *back, "--max-shard-size", "1MB", "--adapter"
        ],
        "ours": ["convert", "--hf", save_tokenizer(save_model("qwen2", work / "qwen2")), "--output", work / "ours"],
        "ours with --hf": ["export", "--checkpoint", work / "ours", "--hf", work / "qwen2", *back],
    }  # fmt: skip
    return dict(zip(commands, run_commands(work, *commands.values()), strict=True))


def run_commands(work: Path, *commands: list[object]) -> list[dict[str, Any]]:
    """Of each command, in one process on CPU: exit code, standard output and error."""
    given = [json.dumps([str(word) for word in command]) for command in commands]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.adapters.bridge_cli",
            str(work / "results.json"),
            *given,
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads((work / "results.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", list(UNMAPPED))
def test_the_way_there_and_back_gives_the_same_weights_and_log_probs(
    name: str, work: Path, said: dict[str, Any]
) -> None:
    for command in (f"convert {name}", f"export {name}"):
        assert said[command]["code"] == 0, said[command]
    source, back = work / name, work / f"{name}-back"
    given, found = tensors(source), tensors(back)
    assert given.keys() == found.keys()
    for key in given:
        assert given[key].dtype == found[key].dtype, key
        assert torch.equal(given[key], found[key]), key
    tokens = tokens_for(name)
    assert torch.equal(hf_logprobs(source, tokens), hf_logprobs(back, tokens))
    assert (back / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()


def test_commands_say_what_to_do_next(work: Path, said: dict[str, Any]) -> None:
    converted = said["convert mistral"]["out"].splitlines()[-1]
    assert "not for pear_megatron.train" in converted
    assert f"export --checkpoint {work / 'mistral-bridge'} --hf {work / 'mistral'}" in converted
    assert f"exported {work / 'mistral-bridge' / 'iter_0000000'}\n" in said["export mistral"]["out"]


def test_a_conversion_is_replaced_and_one_checkpoint_of_it_exported(work: Path, said: dict[str, Any]) -> None:
    assert said["again"]["code"] == 0, said["again"]
    assert said["one checkpoint"]["code"] == 0, said["one checkpoint"]
    assert tensors(work / "one").keys() == tensors(work / "mistral").keys()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("missing", r"would lose or change 2 tensor.*missing: model.layers.1.self_attn.k_proj"),
        ("unknown", rf"would lose or change 1 tensor.*unknown: {Q}.bias"),
        ("narrower", r"would lose or change 46 tensor.*is every tensor there, of config.json's dtype"),
        (
            "olmo",
            r"olmo/config.json: .*refuses it: Model architecture 'OlmoForCausalLM' is not yet supported$",
        ),
        ("without --hf", r"mistral-bridge is a checkpoint of Megatron-Bridge.* --hf SOURCE"),
        ("another --hf", r"could not export .*iter_0000000, if it was converted from --hf .*gemma2"),
        ("no --hf", r"no Hugging Face checkpoint at .*absent"),
        ("no checkpoint", r"no checkpoint at .*absent"),
        ("into --hf", r"writing it would remove what it is made from"),
        ("convert's options", r"^error: --tensor-parallel, --dtype: .*leave them out"),
        ("export's options", r"^error: --max-shard-size, --adapter: .*leave them out"),
        ("ours with --hf", r"no run_config.yaml, so Megatron-Bridge did not write it.*exported without it"),
    ],
)
def test_what_would_go_wrong_is_an_error_and_leaves_nothing(
    command: str, message: str, work: Path, said: dict[str, Any]
) -> None:
    assert said[command]["code"] == 1
    assert re.search(message, said[command]["err"].splitlines()[-1]), said[command]["err"][-2000:]
    for name in (f"{command}-bridge", "nothing"):
        assert not (work / name).exists()
    assert not list(work.glob(".*"))


def test_a_converted_model_trains_in_bridge_and_comes_back_as_trained(tmp_path: Path) -> None:
    source = save_tokenizer(save_model("mistral", tmp_path / "model", vocab_size=1000, dtype=torch.float32))
    data, bridge, saved = (
        write_trajectories(tmp_path / "data.jsonl", 60),
        tmp_path / "bridge",
        tmp_path / "saved",
    )
    [converted] = run_commands(tmp_path, ["convert", "--hf", source, "--output", bridge])
    assert converted["code"] == 0, converted
    given = ["--hf", str(source), "--weights", str(bridge), "--data", str(data), "--save", str(saved)]
    run(1, tmp_path, *given)
    wanted, model = expected(
        tmp_path, PearConfig(), seq_length=128, learning_rate=1e-3, batch=8, steps=10, seed=1234
    )
    compare(tmp_path, wanted, rel=1e-4)
    cut = Path(shutil.copytree(saved, tmp_path / "cut"))
    next(cut.rglob("*.distcp")).write_bytes(b"")
    exported, refused = run_commands(
        tmp_path,
        ["export", "--checkpoint", saved, "--hf", source, "--output", tmp_path / "back"],
        ["export", "--checkpoint", cut, "--hf", source, "--output", tmp_path / "nothing"],
    )
    assert exported["code"] == 0, exported
    assert "iter_0000010\n" in exported["out"]
    trained, start = tensors(tmp_path / "back"), tensors(source)
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(trained[name], weights, atol=3e-4, rtol=0, msg=name)
        assert (trained[name] - start[name]).abs().max() > 3e-3, name
    assert refused["code"] == 1
    assert "could not export" in refused["err"]
    assert not (tmp_path / "nothing").exists()
