"""NeMo-RL's own word on recipes, broken ones and ours. Needs NEMO_RL_DIR, and NeMo-RL's dependencies to import it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pear_megatron.cli import app
from pear_megatron.rl.nemo_rl import preflight
from tests.rl.nemo_rl.exports import write_export

RECIPES = Path(__file__).parents[3] / "recipes" / "grpo"
PROGRAM = Path(preflight.__file__).parent / "rehearsal"
CHECKOUT = os.environ.get("NEMO_RL_DIR")
GYM = "./examples/nemo_gym/run_grpo_nemo_gym.py"

# Overrides of qwen2.5-7b.yaml -> a key that the refusal names.
BROKEN = {
    "grpo.num_prompts_per_step=many": "grpo.num_prompts_per_step",
    "grpo.num_generations_per_prompt=0": "grpo.num_generations_per_prompt",
    "grpo.batch_multiplier=2": "grpo.batch_multiplier",
    "grpo.val_num_generations_per_prompt=0": "grpo.val_num_generations_per_prompt",
    "grpo.val_batch_size=0": "grpo.val_batch_size",
    "+grpo.stop_at_validation_metric=accuracy": "grpo.stop_at_validation_threshold",
    "+grpo.skip_reference_policy_logprobs_calculation=true": "loss_fn.reference_policy_kl_penalty",
    "grpo.adv_estimator.name=ppo": "grpo.adv_estimator.name",
    "grpo.async_grpo.enabled=true": "policy.generation.vllm_cfg.async_engine",
    "grpo.async_grpo.enabled=true grpo.use_dynamic_sampling=true": "grpo.use_dynamic_sampling",
    "loss_fn.force_on_policy_ratio=true": "loss_fn.force_on_policy_ratio",
    "checkpointing.checkpoint_must_save_by=tomorrow": "checkpointing.checkpoint_must_save_by",
    "cluster.num_nodes=3": "cluster.num_nodes",
    "cluster.gpus_per_node=eight": "cluster.gpus_per_node",
    "data.train.dataset_name=DeepScaller": "data.train.dataset_name",
    "data.train.dataset_name=ResponseDataset": "data.train.dataset_name",
    "data.validation=null": "grpo.val_period",
    "data.default.env_name=maths": "data.default.env_name",
    "data.default.prompt_file=nowhere.txt": "data.default.prompt_file",
    "data.default.processor=nothing": "data.default.processor",
    "policy.train_global_batch_size=96": "policy.train_global_batch_size",
    "policy.max_total_sequence_length=long": "policy.max_total_sequence_length",
    "policy.precision=fp8": "policy.generation.vllm_cfg.precision",
    "~policy.precision": "policy.precision",
    "policy.logprob_chunk_size=1024": "policy.megatron_cfg.defer_fp32_logits",
    "policy.dtensor_cfg.enabled=true": "policy.dtensor_cfg.enabled",
    "policy.megatron_cfg.enabled=false": "policy.megatron_cfg.enabled",
    "policy.dynamic_batching.enabled=true": "policy.dynamic_batching.enabled",
    "policy.sequence_packing.train_mb_tokens=4096": "policy.sequence_packing.train_mb_tokens",
    "policy.sequence_packing.logprob_mb_tokens=1000": "policy.sequence_packing.logprob_mb_tokens",
    "policy.sequence_packing.algorithm=best": "policy.sequence_packing.algorithm",
    "policy.sequence_packing.enabled=false policy.train_micro_batch_size=3": "policy.train_micro_batch_size",
    "policy.sequence_packing.enabled=false policy.logprob_batch_size=3": "policy.logprob_batch_size",
    "policy.make_sequence_length_divisible_by=1 policy.megatron_cfg.sequence_parallel=true": (
        "policy.make_sequence_length_divisible_by"
    ),
    "policy.megatron_cfg.context_parallel_size=2 policy.sequence_packing.enabled=false": (
        "policy.megatron_cfg.context_parallel_size"
    ),
    "policy.megatron_cfg.tensor_model_parallel_size=0": "policy.megatron_cfg.tensor_model_parallel_size",
    "policy.megatron_cfg.tensor_model_parallel_size=two": "policy.megatron_cfg.tensor_model_parallel_size",
    "policy.megatron_cfg.tensor_model_parallel_size=4": "policy.logprob_batch_size",
    "policy.megatron_cfg.pipeline_model_parallel_size=3": "policy.megatron_cfg.pipeline_model_parallel_size",
    "policy.megatron_cfg.pipeline_dtype=bf16": "policy.megatron_cfg.pipeline_dtype",
    "+policy.megatron_cfg.attention_backend=flsh": "policy.megatron_cfg.attention_backend",
    "policy.megatron_cfg.recompute_granularity=none": "policy.megatron_cfg.recompute_granularity",
    "policy.megatron_cfg.use_fused_linear_logprobs=true": "policy.megatron_cfg.use_fused_linear_logprobs",
    "policy.megatron_cfg.optimizer.optimizer_cpu_offload=true": (
        "policy.megatron_cfg.optimizer.optimizer_offload_fraction"
    ),
    "policy.generation.top_p=1.5": "policy.generation.top_p",
    "policy.generation.top_k=0": "policy.generation.top_k",
    "policy.generation.val_temperature=0.5": "policy.generation.val_temperature",
    "policy.generation.colocated.enabled=false": "policy.generation.colocated.resources.num_nodes",
    "policy.generation.vllm_cfg.max_model_len=16384": "policy.generation.vllm_cfg.max_model_len",
    "policy.generation.vllm_cfg.tensor_parallel_size=5": "policy.generation.vllm_cfg.tensor_parallel_size",
    "policy.generation.vllm_cfg.pipeline_parallel_size=2": "policy.generation.vllm_cfg.async_engine",
    "policy.generation.vllm_cfg.expert_parallel_size=3": "policy.generation.vllm_cfg.expert_parallel_size",
    "policy.generation.vllm_cfg.kv_cache_dtype=fp8": "policy.generation.vllm_cfg.kv_cache_dtype",
}


@pytest.fixture(scope="module")
def rehearse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """(recipe, overrides, script) -> the report of a rehearsal, from an export of Qwen2.5-7B's shape."""
    if not CHECKOUT:
        pytest.skip("NEMO_RL_DIR names no checkout of NeMo-RL")
    if not (find_spec("ray") and find_spec("tensordict")):
        pytest.skip("this environment lacks NeMo-RL's own dependencies")
    folder = tmp_path_factory.mktemp("rehearsals")
    export = write_export(folder / "export")
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("rehearsals.py")), str(PROGRAM)],
        cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
    )  # fmt: skip
    assert server.stdin
    assert server.stdout

    def run(recipe: Path, *overrides: str, script: str = "./examples/run_grpo.py") -> dict[str, Any]:
        assert server.stdin
        assert server.stdout
        report = folder / "report.json"
        arguments = [str(report), script, "--config", str(recipe), f"policy.model_name={export}", *overrides]
        server.stdin.write(json.dumps(arguments) + "\n")
        server.stdin.flush()
        assert server.stdout.readline() == "0\n", Path(log.name).read_text()[-3000:]
        said: dict[str, Any] = json.loads(report.read_text())
        report.unlink()
        return said

    yield run
    server.stdin.close()
    server.wait()
    log.close()


@pytest.mark.parametrize(("overrides", "key"), BROKEN.items())
def test_nemo_rl_refuses_the_broken_recipe_and_the_key_is_named(
    rehearse: Callable[..., dict[str, Any]], overrides: str, key: str
) -> None:
    said = rehearse(RECIPES / "qwen2.5-7b.yaml", *overrides.split())
    assert said["imported"]
    assert said["unchecked"] == []
    assert key in {key for fault in said["faults"] for key in fault["keys"]}
    for fault in said["faults"]:
        file, _, line = fault["at"].partition(":")
        assert (Path(CHECKOUT or "") / file).is_file()
        assert int(line) > 0
        assert fault["says"]
        assert len(fault["keys"]) <= 12


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_nemo_rl_takes_our_recipes(
    rehearse: Callable[..., dict[str, Any]], name: str, tmp_path: Path
) -> None:
    overrides = []
    if name.endswith("from_megatron.yaml"):
        (tmp_path / "metadata.json").touch()
        overrides = [f"checkpointing.pretrained_checkpoint.path={tmp_path}"]
    gym = {"script": GYM} if "puzzles" in name else {}
    said = rehearse(RECIPES / name, *overrides, **gym)
    assert said == {"imported": True, "faults": [], "unchecked": []}


def test_the_command_refuses_with_nemo_rls_words_its_file_and_the_key(
    rehearse: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_export(tmp_path / "export")
    command = ["grpo", "--config", str(RECIPES / "qwen2.5-7b.yaml"), "--checkpoint", "export", "--dry-run"]
    done = CliRunner().invoke(app, [*command, "policy.logprob_chunk_size=1024", "grpo.val_batch_size=256"])
    assert done.exit_code == 1
    assert "2 faults" in done.stderr
    assert "policy.logprob_chunk_size=1024" in done.stderr
    assert (
        "defer_fp32_logits must be True if logprob_chunk_size is set (NeMo-RL, nemo_rl/models/" in done.stderr
    )
    assert "holds no batch of grpo.val_batch_size 256" in done.stderr
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    assert "has not checked" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]  # nothing was written
