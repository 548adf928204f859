"""A rehearsal of NeMo-RL's start: its own script and workers' set-up code run, up to where the first GPU is needed.

    python rehearsal REPORT SCRIPT --config RECIPE.yaml [key=value ...]     (in a checkout, in NeMo-RL's environment)

Ray, workers and the data sets' rows are stand-ins, the rest is NeMo-RL's. REPORT gets JSON: ``faults``, a list of
{says, at, keys}, empty if it would start; ``unchecked``, why a part could not be rehearsed; ``imported``, whether
NeMo-RL could be. Nothing of pear_megatron is imported: NeMo-RL's environment need not have it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import blame
import stand_ins
from stand_ins import Anything, TrainingBegins, Unborn, Workers

ROOT = Path.cwd().resolve()
BATCH_KEYS = (
    "grpo.num_prompts_per_step", "grpo.num_generations_per_prompt", "policy.train_global_batch_size",
    "cluster.num_nodes", "cluster.gpus_per_node",
)  # fmt: skip
PACKING_KEYS = (
    "policy.max_total_sequence_length", "policy.make_sequence_length_divisible_by",
    "policy.generation.vllm_cfg.max_model_len",
)  # fmt: skip


class Rehearsal:
    """One run of NeMo-RL's script, and what it found."""

    def __init__(self) -> None:
        self.faults: list[dict[str, Any]] = []
        self.unchecked: list[str] = []
        self.imported = False
        self.recipe: dict[str, Any] = {}
        self.policy: Any = None

    def run(self, script: str, arguments: list[str]) -> None:
        """Runs the script to its end, or to the first thing that is wrong."""
        script = str(Path(script).resolve())
        try:
            grpo = importlib.import_module("nemo_rl.algorithms.grpo")
        except ImportError as error:
            self.unchecked.append(f"{type(error).__name__}: {error}")
            return
        self.imported = True
        with contextlib.ExitStack() as stack, self.watch():
            for where, name, instead in self.replaced(grpo):
                stack.enter_context(patch.object(where, name, instead))
            stack.enter_context(patch.object(sys, "argv", [script, *arguments]))
            with contextlib.suppress(TrainingBegins):
                runpy.run_path(script, run_name="__main__")

    def replaced(self, grpo: Any) -> Iterator[tuple[Any, str, Any]]:
        """(module, name, stand-in) for all that needs more than this process."""
        cluster, logger, policy, data, raw, kinds, environments, checkpoint = (
            importlib.import_module(f"nemo_rl.{name}")
            for name in (
                "distributed.virtual_cluster", "utils.logger", "models.policy.lm_policy", "data.utils",
                "data.datasets.raw_dataset", "data.datasets.response_datasets", "environments.utils",
                "utils.checkpoint",
            )
        )  # fmt: skip
        yield cluster, "init_ray", lambda *_, **__: None
        yield logger, "get_next_experiment_dir", lambda folder: folder
        yield grpo, "MasterConfig", self.remembering(grpo.MasterConfig)
        yield checkpoint.CheckpointManager, "get_latest_checkpoint_path", lambda _: None
        yield grpo, "Logger", Anything
        yield grpo, "RayVirtualCluster", stand_ins.Cluster
        yield grpo, "prepare_segment_topology", lambda *_, **__: (None, [], {})
        yield grpo, "spinup_nemo_gym_actor", lambda **_: Unborn()
        yield grpo, "setup", self.setup_and_workers(grpo, grpo.setup)
        yield grpo, "get_actor_python_env", _begin
        yield grpo, "shutdown_environments", lambda *_: None
        for engine in ("SGLangGeneration", "TrtllmGeneration", "DynamoGeneration"):
            yield grpo, engine, Anything
        yield grpo.VllmGeneration, "__init__", _to_the_placement(grpo.VllmGeneration.__init__)
        for method in ("finish_generation", "load_and_start", "shutdown", "__del__"):
            yield grpo.VllmGeneration, method, lambda *_, **__: True
        for name in ("RayQueue", "RayWorkerBuilder"):
            yield policy, name, Anything
        yield policy, "RayWorkerGroup", Workers
        yield policy.Policy, "__del__", lambda _: None
        yield grpo, "Policy", self.policy_of(policy.Policy)
        yield data, "create_env", _registered(environments)
        rowless = {
            name: stand_ins.data_set(kind, raw.RawDataset) for name, kind in kinds.DATASET_REGISTRY.items()
        }
        yield kinds, "DATASET_REGISTRY", rowless

    def remembering(self, master_config: Any) -> Any:
        """MasterConfig, whose arguments are kept: errors are explained with them."""

        def start(config: Any, **values: Any) -> None:
            self.recipe = json.loads(json.dumps(values, default=str))
            master_config.__init__(config, **values)

        return type("MasterConfig", (master_config,), {"__init__": start, "__module__": __name__})

    def policy_of(self, policy: Any) -> Any:
        """Policy, which is the last that setup needs."""

        def make(**arguments: Any) -> None:
            self.policy = policy(**arguments)
            raise TrainingBegins

        return make

    def setup_and_workers(self, grpo: Any, setup: Any) -> Any:
        """NeMo-RL's setup, a step's batches, and what each worker does before it loads the model."""

        def rehearsed(config: Any, *arguments: Any, **options: Any) -> tuple[Any, ...]:
            with contextlib.suppress(TrainingBegins):
                setup(config, *arguments, **options)
            if self.policy is not None:
                self.batches(config)
                if config.policy["megatron_cfg"]["enabled"]:
                    self.workers(config.policy)
            # policy, generation, gym, clusters, 2 loaders, loss, logger, checkpointer, state, config, teachers
            nobody: Any = Unborn()
            return (
                nobody, Anything(), nobody, (nobody, nobody), nobody, nobody, nobody, Anything(),
                contextlib.nullcontext(), grpo._get_grpo_save_state(None), config, {}, {},
            )  # fmt: skip

        return rehearsed

    def batches(self, config: Any) -> None:
        """A step whose every rollout has the greatest length, cut as for log-probs and for training."""
        import torch
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict

        policy, grpo = config.policy, config.grpo
        packing = policy["sequence_packing"]["enabled"]
        length = policy["max_total_sequence_length"]
        if policy["generation"]["backend"] == "vllm":
            length = policy["generation"]["vllm_cfg"]["max_model_len"]
        rollouts = grpo.num_prompts_per_step * grpo.num_generations_per_prompt
        data = BatchedDataDict(
            {
                "input_ids": torch.zeros(1, 1, dtype=torch.int8).expand(rollouts, 1 if packing else length),
                "input_lengths": torch.full((rollouts,), length, dtype=torch.int32),
            }
        )
        section = "sequence_packing" if packing else "dynamic_batching"
        for run, micro_batch, budget in (
            (lambda: self.policy.get_logprobs(data), "logprob_batch_size", "logprob_mb_tokens"),
            (lambda: self.policy.train(data, None), "train_micro_batch_size", "train_mb_tokens"),
        ):
            cut = [f"policy.{section}.{budget}", *PACKING_KEYS] if packing else [f"policy.{micro_batch}"]
            with self.watch([*BATCH_KEYS, *cut]):
                with contextlib.suppress(TrainingBegins):
                    run()
                batch = Workers.batches[0]
                if budget.startswith("train"):
                    batch = batch.get_batch(
                        0, policy["train_global_batch_size"] // self.policy.data_parallel_size
                    )
                self.micro_batches(batch, policy, policy[micro_batch])

    def micro_batches(self, batch: Any, policy: Any, size: int) -> None:
        """A rank's batch, cut as its worker cuts it."""
        import torch

        try:
            workers = stand_ins.import_of_workers("nemo_rl.models.megatron.data")
        except ImportError as error:
            self.unchecked.append(f"the workers' batches: {error}")
            return
        if policy["sequence_packing"]["enabled"]:
            batch["input_ids"] = torch.zeros(1, 1).expand(batch.size, int(batch["input_lengths"].max()))
        workers.get_microbatch_iterator(batch, policy, size, straggler_timer=None)
        if not (policy["sequence_packing"]["enabled"] or policy["dynamic_batching"]["enabled"]):
            next(iter(batch.make_microbatch_iterator(size)))

    def workers(self, policy: Any) -> None:
        """What a Megatron worker asks of the recipe before it builds the model."""
        try:
            setup = stand_ins.import_of_workers("nemo_rl.models.megatron.setup")
        except ImportError as error:
            self.unchecked.append(f"the Megatron workers' set-up: {error}")
            return
        model = Anything(
            gated_linear_unit=True, num_moe_experts=None, vocab_size=1, make_vocab_size_divisible_by=1
        )
        model.finalize = model.__dict__["__post_init__"] = lambda: None
        provider = Anything(to_megatron_provider=lambda **_: model)
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack, self.watch():
            converted = Path(folder) / "iter_0000000"
            converted.mkdir()
            (converted / "run_config.yaml").touch()
            for name, instead in (
                ("AutoBridge", Anything),
                ("load_model_config", lambda _: (model, None)),
                ("calculate_padded_vocab_size", lambda *_: 1),
                ("ConfigContainer", Anything),
            ):
                stack.enter_context(patch.object(setup, name, instead))
            stack.enter_context(
                patch.object(setup, "AutoBridge", Anything(from_hf_config=lambda _: provider))
            )
            stack.enter_context(patch.dict(os.environ))
            name, path, _ = setup.validate_model_paths(policy)
            path = path if policy.get("pretrained_checkpoint") else folder
            setup.validate_and_set_config(policy, 0, name, path, None, None)

    @contextlib.contextmanager
    def watch(self, about: Sequence[str] = ()) -> Iterator[None]:
        """Errors of NeMo-RL inside are faults of the recipe; ``about``: the keys that this part depends on."""
        try:
            yield
        except (Exception, SystemExit) as error:
            at = blame.raised_at(error, ROOT)
            ours = isinstance(error, AttributeError) and isinstance(
                error.obj, Anything | Unborn | stand_ins.Cluster
            )
            if at is None or ours or isinstance(error, ImportError):
                traceback.print_exc()
                self.unchecked.append(f"{type(error).__name__}: {error}")
                return
            for says, keys in self.words_of(error):
                keys = keys or blame.keys_of(error, at, self.recipe, about)
                fault = {"says": says, "at": f"{at[0].relative_to(ROOT)}:{at[1]}", "keys": keys}
                if fault not in self.faults:
                    self.faults.append(fault)

    def words_of(self, error: BaseException) -> Iterator[tuple[str, list[str]]]:
        """(message, keys) of each thing that an error says is wrong; pydantic's name their keys."""
        if not callable(errors := getattr(error, "errors", None)):
            text = " ".join(str(error).replace("-" * 80, "").split())
            yield f"there is no {text}" if isinstance(error, KeyError) else text or type(error).__name__, []
            return
        # pydantic also says why a section is not the same section switched off
        wrong = [one for one in errors() if not any(str(part).endswith("Disabled") for part in one["loc"])]
        for one in wrong or errors():
            got = "" if one["type"] == "missing" else f", not {one['input']!r:.60}"
            key, section = list[str](), self.recipe
            for part in map(str, one["loc"]):  # which has names of types in it as well
                if isinstance(section, dict) and (part in section or part == str(one["loc"][-1])):
                    key, section = [*key, part], section.get(part, {})
            yield f"{one['msg']}{got}", [".".join(key)]


def _begin(*_: Any, **__: Any) -> None:
    raise TrainingBegins


def _to_the_placement(start: Any) -> Any:
    def begin(self: Any, *arguments: Any, **options: Any) -> None:
        with contextlib.suppress(TrainingBegins):
            start(self, *arguments, **options)
        self.dp_openai_server_base_urls = []

    return begin


def _registered(environments: Any) -> Any:
    def create(env_name: str, env_config: dict[str, Any]) -> Any:
        with patch.object(environments, "get_object", _begin), contextlib.suppress(TrainingBegins):
            environments.create_env(env_name=env_name, env_config=env_config)
        return Unborn()

    return create


def prepare() -> None:
    """Sees to it that nothing is started, fetched or written."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    os.environ.setdefault(
        "TORCH_CUDA_ARCH_LIST", "9.0"
    )  # which workers insist on, and nothing is compiled here
    sys.path[0] = str(ROOT)  # this folder is no part of NeMo-RL's path
    sys.dont_write_bytecode = True


def main(report: str, script: str, *arguments: str) -> None:
    """One rehearsal, written to ``report``."""
    rehearsal = Rehearsal()
    rehearsal.run(script, list(arguments))
    said = {name: getattr(rehearsal, name) for name in ("imported", "faults", "unchecked")}
    Path(report).write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    prepare()
    main(*sys.argv[1:])
