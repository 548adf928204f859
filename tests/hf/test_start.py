"""Training starts from Hugging Face weights, and what it leaves can be exported when its source is gone."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_megatron.megatron.checkpoint.export import export_checkpoint
from tests.distributed import run_ranks
from tests.hf.models import hf_logprobs, save_tokenizer
from tests.hf.ranks import rank_train
from tests.hf.test_round_trip import tensors_of

RECIPES = Path(__file__).parents[2] / "recipes" / "sft"
BASE, TINY = RECIPES / "base.yaml", RECIPES / "tiny.yaml"
SHORT = ["+train.max_steps=2", "train.precision=fp32", "train.global_batch_size=8", "train.micro_batch_size=2",
         "data.seq_length=64", "optimizer.lr=0.0001"]  # fmt: skip
TP, PP = "+parallel.tensor_model_parallel_size=2", "+parallel.pipeline_model_parallel_size=2"

pytestmark = pytest.mark.slow
# The rows hold token ids; loading transformers in every rank takes seconds.
NO_TOKENIZER = "+data.tokenizer=null"


def write_rows(path: Path, **fields: Any) -> Path:
    """Eight rows of tokens below 258, none of which shares a row of a batch: every step sees them all."""
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(8):
            tokens = [rng.randrange(258) for _ in range(rng.randint(40, 60))]
            mask = [0] * 4 + [1] * (len(tokens) - 4)
            row = {"input_ids": tokens, "loss_mask": mask, "behavior_logprobs": [-5.0 * m for m in mask]}
            file.write(json.dumps(row | fields) + "\n")
    return path


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("loss", "nll", "grad_norm", "pear/log_ratio")} for row in rows]


class World:
    """A Hugging Face folder with a tokenizer, its converted twin, data, and the runs that start from them."""

    def __init__(self, root: Path, source: Path, checkpoint: Path) -> None:
        self.root, self.source, self.checkpoint = root, source, checkpoint
        self.data = write_rows(root / "rows.jsonl")
        foreign = write_rows(root / "foreign.jsonl", tokenizer_hash="0123456789abcdef")
        from_hf, from_checkpoint = f"+model.hf={source}", f"+checkpoint.pretrained={checkpoint}"
        model = ["+model.hidden_size=32", "+model.ffn_hidden_size=48", "+model.num_attention_heads=4",
                 "+model.num_query_groups=2", "+model.kv_channels=24", "+model.vocab_size=517",
                 "+model.max_position_embeddings=4096", "+model.qk_layernorm=true",
                 "+model.share_embeddings_and_output_weights=true"]  # fmt: skip
        bare = root / "written-by-another-program" / "iter"
        shutil.copytree(checkpoint / "iter_0000000", bare)
        self.outcomes = self.train(
            1,
            {
                "tp1": [from_hf, NO_TOKENIZER],
                "pretrained": [from_checkpoint, *model, "+model.num_layers=4"],
                "bare": [f"+checkpoint.pretrained={bare}", *model, "+model.num_layers=4"],
                "other": [from_checkpoint, *model, "+model.num_layers=2"],
                "foreign": [from_hf, f"data.train={foreign}"],
            },
        )
        self.train(2, {"tp2": [from_hf, NO_TOKENIZER, TP], "pp2": [from_hf, NO_TOKENIZER, PP]})

    def train(self, ranks: int, runs: dict[str, list[str]]) -> dict[str, str]:
        """The error that each run ended with, or nothing."""
        overrides = [
            [f"+output_dir={self.root / name}", f"+data.train={self.data}", *SHORT, *extra]
            for name, extra in runs.items()
        ]
        return dict(zip(runs, run_ranks(ranks, rank_train, BASE, overrides)[0], strict=True))


@pytest.fixture(scope="module")
def world(
    hf_models: dict[str, Path], converted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> World:
    return World(tmp_path_factory.mktemp("world"), hf_models["qwen3-tied"], converted["qwen3-tied"])


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_two_steps_from_model_hf_are_the_same_on_every_layout(world: World, layout: str) -> None:
    assert world.outcomes["tp1"] == world.outcomes["pretrained"] == ""
    reference = metrics(world.root / "tp1")
    assert len(reference) == 2
    for row, expected in zip(metrics(world.root / layout), reference, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_the_first_step_sees_the_weights_of_the_folder(world: World) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    decisions = [hf_logprobs(world.source, torch.tensor([row["input_ids"]]))[0, 3:] for row in rows]
    assert metrics(world.root / "tp1")[0]["nll"] == pytest.approx(
        -torch.cat(decisions).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("run", ["pretrained", "bare"])
def test_a_converted_checkpoint_starts_the_same_run_also_without_its_model_file(
    world: World, run: str
) -> None:
    assert metrics(world.root / run) == metrics(world.root / "tp1")


@pytest.mark.parametrize("run", ["tp1", "pretrained"])
def test_a_run_is_exported_without_its_source(world: World, tmp_path: Path, run: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    moved = tmp_path / "run"
    shutil.copytree(world.root / run, moved)
    away = [(world.source, tmp_path / "source"), (world.checkpoint, tmp_path / "checkpoint")]
    for path, place in away:
        path.rename(place)
    try:
        for named in (moved, moved / "checkpoints", moved / "checkpoints" / "iter_0000002"):
            export_checkpoint(named, tmp_path / "out")
    finally:
        for path, place in away:
            place.rename(path)
    out = tmp_path / "out"
    trained, before = tensors_of(out), tensors_of(world.source)
    assert {name: t.shape for name, t in trained.items()} == {name: t.shape for name, t in before.items()}
    assert all((trained[name] - before[name]).abs().max() > 5e-5 for name in before)
    assert AutoModelForCausalLM.from_pretrained(out).config.architectures == ["Qwen3ForCausalLM"]
    chat = [{"role": "user", "content": "Hi"}]
    words = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(chat) for folder in (out, world.source)
    ]
    assert words[0] == words[1]


def test_a_checkpoint_of_another_model_is_refused_by_the_keys_that_differ(world: World) -> None:
    assert world.outcomes["other"].startswith("RecipeError")
    assert "model.num_layers 2 (there 4)" in world.outcomes["other"]
    assert "hidden_size" not in world.outcomes["other"]


def test_rows_of_another_tokenizer_than_the_models_are_refused(world: World) -> None:
    assert world.outcomes["foreign"].startswith("DataError")
    assert "0123456789abcdef" in world.outcomes["foreign"]


def test_a_fresh_model_is_exported_with_a_config_of_its_own(world: World, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = save_tokenizer(tmp_path / "tokenizer", end="<|end|>")
    common = [f"data.train={world.data}", "train.max_steps=1"]
    runs = [
        [*common, f"output_dir={tmp_path / 'plain'}", "model.add_qkv_bias=true"],
        [*common, f"output_dir={tmp_path / 'tokenizer-too'}", f"data.tokenizer={tokenizer}"],
    ]
    assert run_ranks(1, rank_train, TINY, runs)[0] == ["", ""]
    for name in ("plain", "tokenizer-too"):
        export_checkpoint(tmp_path / name, tmp_path / f"{name}-out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain-out").config
    assert (plain.model_type, plain.eos_token_id, plain.vocab_size) == ("qwen2", None, 1000)
    out = tmp_path / "tokenizer-too-out"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.model_type, model.generation_config.eos_token_id) == ("llama", 257)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|end|>"


def test_the_exports_template_and_end_tokens_are_those_of_the_training(tmp_path: Path) -> None:
    """A base model's tokenizer: another EOS than the template's end of turn, and another template than the run's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "plain"))
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi", "response": "Hello"}\n' * 8)
    run = [f"data.train={rows}", f"data.tokenizer={tmp_path / 'tokenizer'}", f"data.chat_template={template}",
           f"output_dir={tmp_path / 'run'}", "pear.variant=none", "train.max_steps=1"]  # fmt: skip
    assert run_ranks(1, rank_train, TINY, [run])[0] == [""]
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.chat_template == template.read_text()
    assert exported.eos_token == "<|endoftext|>"
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert exported.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>"]
