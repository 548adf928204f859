"""`pear-megatron grpo`: the command it ends in, and what it refuses before anything is queued."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pear_megatron.cli import app
from pear_megatron.errors import RecipeError
from pear_megatron.rl.nemo_rl.config import compose
from pear_megatron.rl.nemo_rl.launch import Launch, prepare
from pear_megatron.rl.nemo_rl.rules import layout, size_faults
from tests.rl.nemo_rl.exports import write_export

RECIPES = Path(__file__).parents[3] / "recipes" / "grpo"
QWEN = RECIPES / "qwen2.5-7b.yaml"


@pytest.fixture
def export(nemo_rl: Path, tmp_path: Path) -> Path:
    return write_export(tmp_path / "export")


def refusal(recipe: Path, checkpoint: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        prepare(recipe, checkpoint, list(overrides))
    return str(caught.value)


def value_of(launch: Launch, key: str) -> Any:
    return launch.recipe.get(key)


def test_dry_run_prints_one_command_that_starts_nemo_rl_from_the_checkpoint(
    nemo_rl: Path, export: Path
) -> None:
    arguments = [
        "grpo",
        "--config",
        str(QWEN),
        "--checkpoint",
        str(export),
        "--dry-run",
        "grpo.max_num_steps=7",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:3] == ["cd", str(nemo_rl), "&&"]
    assert f"NEMO_RL_DIR={nemo_rl}" in words
    script = words.index("./examples/run_grpo.py")
    assert words[script + 1 : script + 4] == ["--config", str(QWEN), "grpo.max_num_steps=7"]
    assert f"policy.model_name={export}" in words
    assert done.stdout.count("\n") == 1
    assert "grpo.val_num_generations_per_prompt: 8 (NeMo-RL: 1)" in done.stderr
    assert "4 node(s) x 8 GPUs: train on 32 with TP 2 x PP 1 x CP 1 x DP 16" in done.stderr


def test_the_printed_overrides_compose_to_the_same_configuration(nemo_rl: Path, tmp_path: Path) -> None:
    awkward = write_export(tmp_path / "it's an export=1, {final}", eos="<|endoftext|>")
    launch = prepare(QWEN, awkward, ["grpo.max_num_steps=7"])
    again = compose(nemo_rl, QWEN, launch.arguments[3:])
    assert again.values == launch.recipe.values
    assert again.get("policy.model_name") == again.get("policy.tokenizer.name") == str(awkward)


def test_nemo_rl_gets_absolute_paths_since_it_runs_in_its_own_folder(nemo_rl: Path, export: Path) -> None:
    launch = prepare(QWEN, os.path.relpath(export), ["logger.log_dir=/elsewhere"])
    assert value_of(launch, "policy.model_name") == str(export)
    assert value_of(launch, "checkpointing.checkpoint_dir") == f"{os.getcwd()}/results/grpo/qwen2.5-7b"
    assert value_of(launch, "logger.log_dir") == "/elsewhere"


def test_exit_code_is_1_and_the_error_on_stderr(
    nemo_rl: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    arguments = ["grpo", "--config", str(QWEN), "--checkpoint", str(export)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "error: uv is not installed" in done.stderr


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (None, "NEMO_RL_DIR is not set"),
        ("/", "NEMO_RL_DIR=/ is no checkout of NeMo-RL: it has no nemo_rl/utils"),
    ],
)
def test_without_a_checkout_it_says_where_to_get_one(
    export: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None, says: str
) -> None:
    monkeypatch.delenv("NEMO_RL_DIR")
    if setting:
        monkeypatch.setenv("NEMO_RL_DIR", setting)
    text = refusal(QWEN, export)
    assert says in text
    assert "git clone --recursive https://github.com/NVIDIA-NeMo/RL" in text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("policy.megatron_cfg.lr=1e-6", "did you mean policy.megatron_cfg.optimizer.lr?"),
        ("grpo.val_num_generation_per_prompt=4", "did you mean grpo.val_num_generations_per_prompt?"),
        (
            "policy.generation.vllm_cfg.tensor_paralel_size=2",
            "did you mean policy.generation.vllm_cfg.tensor_parallel",
        ),
        ("cluster.num_nodes", "cluster.num_nodes"),
        ("policy.model_name=/else", "--checkpoint"),
        ("+checkpointing.pretrained_checkpoint.path=/else", "--checkpoint"),
    ],
)
def test_misspelt_override_is_refused_with_the_key_that_was_meant(
    export: Path, override: str, says: str
) -> None:
    assert says in refusal(QWEN, export, override)


def test_a_key_that_no_file_of_nemo_rl_shows_needs_a_plus(export: Path) -> None:
    assert "write +policy.quant_cfg=x" in refusal(QWEN, export, "policy.quant_cfg=x")
    assert value_of(prepare(QWEN, export, ["+policy.quant_cfg=x"]), "policy.quant_cfg") == "x"


def test_misspelt_key_in_a_recipe_is_refused(nemo_rl: Path, export: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"defaults: {QWEN}\npolicy: {{megatron_cfg: {{sequence_paralel: true}}}}\n")
    text = refusal(recipe, export)
    assert "NeMo-RL has no key policy.megatron_cfg.sequence_paralel" in text
    assert "did you mean policy.megatron_cfg.sequence_parallel?" in text


def test_keys_of_other_libraries_and_of_data_sets_are_taken(
    nemo_rl: Path, export: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"defaults: {QWEN}\n"
        "policy: {generation: {vllm_kwargs: {max_num_seqs: 64}}, tokenizer: {chat_template_kwargs: {think: 0}}}\n"
        "logger: {wandb: {entity: me}}\n"
        "data: {validation: [{dataset_name: AIME2024, prompt_file: null}]}\n"
    )
    assert value_of(prepare(recipe, export, []), "policy.generation.vllm_kwargs.max_num_seqs") == 64


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("cluster.num_nodes=3", "train_global_batch_size 512 is not divisible by 12 data-parallel ranks"),
        ("policy.megatron_cfg.pipeline_model_parallel_size=3", "does not divide the 32 training GPUs"),
        ("policy.train_global_batch_size=96", "no multiple of policy.train_global_batch_size 96"),
        ("policy.generation.vllm_cfg.tensor_parallel_size=5", "does not divide the 32 GPUs that generate"),
        ("policy.generation.temperature=0", "all samples would be the same"),
        ("grpo.val_batch_size=256", "holds no batch of grpo.val_batch_size 256"),
        ("++policy.optimizer.kwargs.lr=1e-6", "policy.megatron_cfg.optimizer.lr"),
        ("policy.dtensor_cfg.enabled=true", "policy.dtensor_cfg.enabled false"),
        (
            "checkpointing.metric_name=val:pass_k grpo.val_num_generations_per_prompt=1",
            "needs grpo.val_num_generations",
        ),
        ("policy.max_total_sequence_length=262144", "exceeds the model's context of 131072"),
        ("grpo.num_prompts_per_step=many", "grpo.num_prompts_per_step must be a whole number"),
        (
            "grpo.num_generations_per_prompt=0",
            "grpo.num_generations_per_prompt must be a whole number of at least 1",
        ),
        ("grpo.val_batch_size=all", "grpo.val_batch_size must be a whole number"),
        ("policy.train_global_batch_size=1.5", "policy.train_global_batch_size must be a whole number"),
        ("policy.max_total_sequence_length=-1", "policy.max_total_sequence_length must be a whole number"),
        (
            "policy.megatron_cfg.tensor_model_parallel_size=0",
            "tensor_model_parallel_size must be a whole number",
        ),
        ("cluster.gpus_per_node=[8]", "cluster.gpus_per_node must be a whole number"),
        ("policy.tokenizer.name=null", "policy.tokenizer.name None is not a folder"),
    ],
)
def test_what_nemo_rl_ignores_or_cannot_say_here_is_refused(
    nemo_rl: Path, export: Path, override: str, says: str
) -> None:
    assert says in refusal(QWEN, export, *override.split())


def test_it_says_that_nemo_rl_has_not_looked(export: Path) -> None:
    assert any(
        "NeMo-RL itself has not checked this recipe" in note for note in prepare(QWEN, export, []).notes
    )


def test_all_faults_are_named_at_once(export: Path) -> None:
    text = refusal(
        QWEN, export, "grpo.val_batch_size=256", "cluster.num_nodes=3", "policy.generation.temperature=0"
    )
    assert "4 faults" in text
    assert len(text.splitlines()) == 5


@pytest.mark.parametrize(
    ("config", "recipe", "says"),
    [
        ({"num_hidden_layers": 30}, "qwen2.5-32b", "4 does not divide the model's 30 layers"),
        ({"num_attention_heads": 27}, "qwen2.5-7b", "2 does not divide the model's 27 attention heads"),
        (
            {"num_key_value_heads": 3},
            "qwen2.5-7b",
            "2 and the model's 3 key/value heads do not divide one another",
        ),
        ({"max_position_embeddings": 4096}, "qwen2.5-7b", "8192 exceeds the model's context of 4096"),
        ({"vocab_size": 9}, "qwen2.5-7b", "ids up to 9, and the model has 9 embeddings"),
        ({"template": None}, "qwen2.5-7b", "no chat template"),
    ],
)
def test_a_checkpoint_that_the_recipe_does_not_fit_is_refused(
    nemo_rl: Path, tmp_path: Path, config: dict[str, Any], recipe: str, says: str
) -> None:
    export = write_export(tmp_path / "export", **config)
    assert says in refusal(RECIPES / f"{recipe}.yaml", export)


def test_what_is_no_whole_checkpoint_is_refused(nemo_rl: Path, export: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(QWEN, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no checkpoint at" in refusal(QWEN, tmp_path / "empty")
    (export / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert "1 of 1 weight files are missing (model-1.safetensors" in refusal(QWEN, export)
    (export / "model.safetensors.index.json").unlink()
    (export / "model.safetensors").unlink()
    assert "no .safetensors files" in refusal(QWEN, export)
    write_export(export)
    (export / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(QWEN, export)


def test_a_recipe_for_megatron_checkpoints_refuses_an_export(export: Path) -> None:
    assert "starts from a Megatron checkpoint" in refusal(RECIPES / "qwen2.5-7b_from_megatron.yaml", export)


def test_rollouts_stop_where_the_chat_template_ends_an_answer(nemo_rl: Path, tmp_path: Path) -> None:
    """Base models' EOS is <|endoftext|>, which a model trained on chats does not write."""
    base = write_export(tmp_path / "base", eos="<|endoftext|>")
    assert value_of(prepare(QWEN, base, []), "policy.generation.stop_token_ids") == [0, 2]
    chat = write_export(tmp_path / "chat", eos="<|im_end|>")
    assert value_of(prepare(QWEN, chat, []), "policy.generation.stop_token_ids") is None
    asked = prepare(QWEN, base, ["policy.generation.stop_token_ids=[5]"])
    assert value_of(asked, "policy.generation.stop_token_ids") == [5]


def conversion(cache: Path, export: Path) -> Path:
    """What NeMo-RL leaves of an export, named by its path."""
    folder = cache / f"model_{str(export).replace('/', '_')}" / "iter_0000000"
    folder.mkdir(parents=True)
    for name in ("metadata.json", "run_config.yaml"):
        (folder / name).touch()
        later = (export / "model.safetensors").stat().st_ctime + 60
        os.utime(folder / name, (later, later))
    return folder


def test_nemo_rl_converts_again_only_what_changed_under_the_same_path(export: Path, tmp_path: Path) -> None:
    """NeMo-RL's cache goes by the path, so new weights in an old folder would not be trained."""
    flag = "policy.megatron_cfg.force_reconvert_from_hf"
    first = prepare(QWEN, export, [])
    cache = Path(first.environment["NRL_MEGATRON_CHECKPOINT_DIR"])
    assert cache == tmp_path / "nemo_rl_conversions"
    assert not value_of(first, flag)
    folder = conversion(cache, export)
    assert not value_of(prepare(QWEN, export, []), flag)
    old = folder.stat().st_mtime - 3600
    os.utime(folder / "metadata.json", (old, old))
    assert value_of(prepare(QWEN, export, []), flag)


def test_an_unfinished_conversion_is_made_again(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (conversion(tmp_path / "hf" / "nemo_rl", export) / "run_config.yaml").unlink()
    launch = prepare(QWEN, export, [])
    assert value_of(launch, "policy.megatron_cfg.force_reconvert_from_hf")
    assert "is not whole" in launch.notes[0]


def earlier_run(model_name: Path, later: float) -> None:
    step = Path("results/grpo/qwen2.5-7b/step_20")
    step.mkdir(parents=True)
    config = {"policy": {"model_name": str(model_name)}, "checkpointing": {}}
    (step / "config.yaml").write_text(yaml.safe_dump(config))
    moment = (step / "config.yaml").stat().st_mtime + later
    os.utime(step / "config.yaml", (moment, moment))


def test_a_run_is_continued_only_from_its_own_checkpoint(export: Path, tmp_path: Path) -> None:
    """NeMo-RL would go on with whatever checkpoint_dir holds."""
    earlier_run(export, 60)
    assert any("holds 20 steps of this run" in note for note in prepare(QWEN, export, []).notes)
    other = write_export(tmp_path / "other")
    assert f"holds a run that began at {export}" in refusal(QWEN, other)
    prepare(QWEN, other, ["checkpointing.checkpoint_dir=results/another"])


def test_a_run_is_not_continued_after_its_checkpoint_was_replaced(export: Path) -> None:
    earlier_run(export, -3600)
    assert "was changed" in refusal(QWEN, export)


def test_cluster_must_be_the_slurm_job(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    prepare(QWEN, export, [])
    monkeypatch.setenv("DEDICATED_RAY_HEAD", "1")
    assert "ask for 5 node(s) (one for the Ray head) with --nodes=5" in refusal(QWEN, export)
    monkeypatch.delenv("DEDICATED_RAY_HEAD")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    text = refusal(QWEN, export)
    assert "cluster.num_nodes is 4 and the Slurm job has 2 node(s)" in text
    assert "the Slurm job has 4 GPU(s) a node" in text


def test_games_run_through_nemo_gym_with_their_data(export: Path) -> None:
    recipe = RECIPES / "qwen2.5-7b_puzzles.yaml"
    text = refusal(recipe, export)
    assert f"data.train.data_path: no file {os.getcwd()}/data/puzzles_train.jsonl" in text
    Path("data").mkdir()
    for name in ("train", "validation"):
        Path(f"data/puzzles_{name}.jsonl").write_text("{}\n")
    launch = prepare(recipe, export, [])
    assert launch.arguments[0] == "./examples/nemo_gym/run_grpo_nemo_gym.py"
    assert (
        value_of(launch, "data.validation")[0]["data_path"] == f"{os.getcwd()}/data/puzzles_validation.jsonl"
    )


def test_separate_nodes_for_generation_are_counted(nemo_rl: Path) -> None:
    colocated = "policy.generation.colocated"
    overrides = [f"{colocated}.enabled=false", f"{colocated}.resources.num_nodes=4"]
    nothing_left = compose(nemo_rl, QWEN, overrides)
    assert "the 0 training GPUs" in size_faults(nothing_left, layout(nothing_left))[0]
    overrides[1] = f"{colocated}.resources.num_nodes=2"
    half = compose(nemo_rl, QWEN, overrides)
    assert size_faults(half, layout(half)) == []


def test_grpo_starts_without_importing_nemo_rl(export: Path) -> None:
    prepare(QWEN, export, [])
    assert "nemo_rl" not in sys.modules
