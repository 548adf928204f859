"""LoRA: the adapters are PEFT's, alike on every layout, and nothing else of the model moves or is stored."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pear_megatron.cli import app
from pear_megatron.errors import CheckpointError, RecipeError
from pear_megatron.hf.assets import read_lora_file
from pear_megatron.megatron.checkpoint.export import export_adapters, export_checkpoint
from pear_megatron.recipe import LoraConfig, load_recipe
from tests.distributed import run_ranks
from tests.hf.models import hf_logprobs, tokens_for
from tests.hf.ranks import rank_train
from tests.hf.test_round_trip import tensors_of
from tests.hf.test_start import BASE, NO_TOKENIZER, PP, SHORT, TP, metrics, write_rows

pytestmark = pytest.mark.slow
STEPS = 4
LORA = ["+lora.rank=4", "+lora.alpha=8", "optimizer.lr=0.01", "+optimizer.adam_eps=1e-4",
        "optimizer.lr_decay_style=constant", "optimizer.lr_warmup_steps=0", f"train.max_steps={STEPS}"]  # fmt: skip
DISTRIBUTED = "parallel.use_distributed_optimizer=true"
ATTENTION = "+lora.target_modules=[q_proj,v_proj,down_proj]"
RECOMPUTE = ["+train.recompute_granularity=full", "+train.recompute_method=uniform",
             "+train.recompute_num_layers=1"]  # fmt: skip


HAS_OUTPUT_PROCESSOR = importlib.metadata.version("megatron-core") >= "0.19"
chunked = pytest.param(
    "chunked", "tp1", marks=pytest.mark.skipif(not HAS_OUTPUT_PROCESSOR, reason="needs megatron-core 0.19")
)


class World:
    """Runs with adapters on two models, one with tied embeddings and biases."""

    def __init__(self, root: Path, models: dict[str, Path], converted: dict[str, Path]) -> None:
        self.root, self.models = root, models
        self.data = write_rows(root / "rows.jsonl")
        plain = "pear.variant=none"
        short = [f"train.max_steps={STEPS // 2}", f"+optimizer.lr_decay_steps={STEPS}"]
        self.train(
            1,
            {
                "tp1": ("qwen2", []),
                "untied": ("llama3", [plain]),
                "some": ("llama3", [plain, ATTENTION]),
                "recomputed": ("qwen2", RECOMPUTE),
                "resumed": ("qwen2", short),
            },
        )
        self.train(1, {"resumed": ("qwen2", [f"+optimizer.lr_decay_steps={STEPS}"])})
        self.train(
            2,
            {
                "tp2": ("qwen2", [TP]),
                "pp2": ("qwen2", [PP]),
                "dp2": ("qwen2", [DISTRIBUTED]),
                "some-tp2": ("llama3", [plain, ATTENTION, TP]),
            },
        )
        if HAS_OUTPUT_PROCESSOR:
            self.train(1, {"chunked": ("qwen2", ["+train.output_chunk_tokens=50"])})
        self.train(4, {"tp2-pp2": ("qwen2", [TP, PP])})

    def overrides(self, name: str, model: str, extra: list[str]) -> list[str]:
        return [f"+output_dir={self.root / name}", f"+data.train={self.data}", f"+model.hf={self.models[model]}",
                NO_TOKENIZER, *SHORT[1:-1], *LORA, *extra]  # fmt: skip

    def train(self, ranks: int, runs: dict[str, tuple[str, list[str]]]) -> None:
        overrides = [self.overrides(name, model, extra) for name, (model, extra) in runs.items()]
        for outcomes in run_ranks(ranks, rank_train, BASE, overrides):
            assert outcomes == [""] * len(runs), outcomes

    def fails(self, name: str, model: str, *extra: str) -> str:
        (error,) = run_ranks(1, rank_train, BASE, [self.overrides(name, model, list(extra))])[0]
        return error


@pytest.fixture(scope="module")
def world(
    hf_models: dict[str, Path], converted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> World:
    return World(tmp_path_factory.mktemp("lora"), hf_models, converted)


@pytest.mark.parametrize(
    ("layout", "reference"),
    [("tp2", "tp1"), ("pp2", "tp1"), ("dp2", "tp1"), ("tp2-pp2", "tp1"), ("recomputed", "tp1"),
     ("some-tp2", "some"), chunked],
)  # fmt: skip
def test_adapters_train_alike_on_every_layout(world: World, layout: str, reference: str) -> None:
    expected = metrics(world.root / reference)
    assert len(expected) == STEPS
    assert expected[0]["nll"] != pytest.approx(expected[-1]["nll"], rel=1e-3)
    for row, other in zip(metrics(world.root / layout), expected, strict=True):
        assert row == pytest.approx(other, rel=2e-5)
    folders = [export(world, name, adapter=True) for name in (layout, reference)]
    ours, theirs = (tensors_of(folder) for folder in folders)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5)


def export(world: World, name: str, *, adapter: bool) -> Path:
    output = world.root / f"{name}-{'adapter' if adapter else 'merged'}"
    if not output.exists():
        (export_adapters if adapter else export_checkpoint)(world.root / name, output)
    return output


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(world: World) -> None:
    assert metrics(world.root / "resumed") == metrics(world.root / "tp1")
    ours, theirs = (tensors_of(export(world, name, adapter=True)) for name in ("resumed", "tp1"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("run", "model"), [("untied", "llama3"), ("some", "llama3")])
def test_training_is_that_of_peft(world: World, run: str, model: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from pear_megatron.megatron.initialize import generator_of

    lora = read_lora_file(world.root / run).lora
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
    frozen = AutoModelForCausalLM.from_pretrained(world.models[model], dtype=torch.float32)
    reference = peft.get_peft_model(frozen, config)
    trained = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    seed = load_recipe(BASE, world.overrides(run, model, [])).seed
    for name, parameter in trained.items():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            generator = generator_of(seed, name.replace(".default", ""))
            parameter.data.uniform_(-bound, bound, generator=generator)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    for row in metrics(world.root / run):
        sums: list[Any] = []
        for one in rows:
            tokens = torch.tensor([one["input_ids"]])
            logprobs = reference(tokens).logits[:, :-1].log_softmax(-1)
            chosen = logprobs.gather(-1, tokens[:, 1:, None])[0, :, 0]
            sums.append(-chosen[torch.tensor(one["loss_mask"][1:], dtype=torch.bool)])
        loss = torch.cat(sums).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)

    ours = tensors_of(export(world, run, adapter=True))
    assert {name.replace(".default", "") for name in trained} == set(ours)
    for name, parameter in trained.items():
        torch.testing.assert_close(
            ours[name.replace(".default", "")], parameter.detach(), rtol=1e-2, atol=2e-4
        )


@pytest.mark.parametrize(("run", "model"), [("tp1", "qwen2"), ("some", "llama3")])
def test_the_merged_model_and_the_adapters_give_the_same_logprobs(world: World, run: str, model: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tokens = tokens_for(model)
    merged = hf_logprobs(export(world, run, adapter=False), tokens)
    assert (merged - hf_logprobs(world.models[model], tokens)).abs().max() > 1e-2
    base = AutoModelForCausalLM.from_pretrained(world.models[model], dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, export(world, run, adapter=True)).eval()
    with torch.inference_mode():
        logprobs = adapted(tokens).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(logprobs.gather(-1, tokens[:, 1:, None])[..., 0], merged, rtol=1e-4, atol=1e-4)


def test_only_the_named_projections_change(world: World) -> None:
    before, after = (tensors_of(f) for f in (world.models["llama3"], export(world, "some", adapter=False)))
    changed = {name.rsplit(".", 2)[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "v_proj", "down_proj"}


def test_checkpoints_hold_adapters_alone(world: World) -> None:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    folder = world.root / "tp1" / "checkpoints" / f"iter_{STEPS:07d}"
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = [name for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)]
    assert len(tensors) == 3 * 14  # A and B of seven projections, and AdamW's two moments of each
    assert all(".lora." in name for name in tensors)


def test_a_lora_run_is_no_model_to_score_with_or_to_start_from(world: World, tmp_path: Path) -> None:
    run = world.root / "tp1"
    result = CliRunner().invoke(
        app, ["score", "--backend", "megatron", "--model", str(run), "--data", str(world.data),
              "--output", str(tmp_path / "scored.jsonl")]
    )  # fmt: skip
    assert result.exit_code == 1
    assert "export --checkpoint" in " ".join(result.output.split())
    keys = yaml.safe_load((run / "model.yaml").read_text())["model"]
    model = [f"+model.{key}={str(value).lower()}" for key, value in keys.items() if value is not None]
    model = [key.replace("rmsnorm", "RMSNorm") for key in model]
    error = world.fails("from-lora", "qwen2", "~model.hf", "~lora", f"+checkpoint.pretrained={run}", *model)
    assert "LoRA run" in error


def test_other_frozen_weights_are_refused(world: World, tmp_path: Path) -> None:
    for name in ("run", "base"):
        shutil.copytree(world.root / "tp1" if name == "run" else world.models["qwen2"], tmp_path / name)
    file = tmp_path / "run" / "lora.yaml"
    file.write_text(file.read_text().replace(str(world.models["qwen2"]), str(tmp_path / "base")))
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    other = tensors_of(tmp_path / "base")
    from safetensors.torch import save_file

    other["model.norm.weight"] += 1
    save_file(other, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="not those that the adapters were trained beside"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(RecipeError, match="--adapter"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    export_adapters(tmp_path / "run", tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_whole_checkpoints_have_no_adapters_to_export(converted: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a LoRA run"):
        export_adapters(converted["qwen2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_file_is_an_error(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.root / "tp1", tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").rglob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        export_adapters(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_fresh_weights_are_refused() -> None:
    with pytest.raises(RecipeError, match="lora trains adapters of a model that is there"):
        load_recipe(BASE.with_name("tiny.yaml"), ["+lora.rank=4", "data.train=x.jsonl", "output_dir=y"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "greater than or equal to 1"), ({"target_modules": ["qkv"]}, "q_proj"),
     ({"target_modules": ["q_proj", "q_proj"]}, "twice"), ({"target_modules": []}, "at least 1")],
)  # fmt: skip
def test_settings_that_fit_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)
