"""What NeMo-RL does not refuse and should, and the sizes that can be checked where NeMo-RL itself is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pear_megatron.errors import RecipeError
from pear_megatron.rl.nemo_rl.config import Composed


@dataclass(frozen=True)
class Layout:
    """How a recipe spreads training and generation over its GPUs, in NeMo-RL's words."""

    num_nodes: int
    gpus_per_node: int
    tensor: int
    pipeline: int
    context: int
    sequence_parallel: bool
    training_gpus: int
    generation_gpus: int
    vllm_tensor: int
    vllm_pipeline: int

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def data_parallel(self) -> int:
        """Copies of the model that train; rounded down where the GPUs do not divide."""
        return self.training_gpus // self.model_parallel

    def __str__(self) -> str:
        return (
            f"{self.num_nodes} node(s) x {self.gpus_per_node} GPUs: train on {self.training_gpus} with TP "
            f"{self.tensor} x PP {self.pipeline} x CP {self.context} x DP {self.data_parallel}"
            f"{', sequence parallel' if self.sequence_parallel else ''}; vLLM on {self.generation_gpus} with TP "
            f"{self.vllm_tensor}"
        )


def layout(recipe: Composed) -> Layout:
    """The layout of a composed recipe.

    Raises:
        RecipeError: a size is no number.
    """
    nodes, per_node = size_of(recipe, "cluster.num_nodes"), size_of(recipe, "cluster.gpus_per_node")
    training = generation = nodes * per_node
    colocated = "policy.generation.colocated"
    if not recipe.get(f"{colocated}.enabled", True):
        whole_nodes = size_of(recipe, f"{colocated}.resources.num_nodes", 0) * per_node
        generation = whole_nodes if nodes > 1 else size_of(recipe, f"{colocated}.resources.gpus_per_node", 0)
        training -= generation
    megatron, vllm = "policy.megatron_cfg", "policy.generation.vllm_cfg"
    return Layout(
        num_nodes=nodes,
        gpus_per_node=per_node,
        tensor=size_of(recipe, f"{megatron}.tensor_model_parallel_size"),
        pipeline=size_of(recipe, f"{megatron}.pipeline_model_parallel_size"),
        context=size_of(recipe, f"{megatron}.context_parallel_size"),
        sequence_parallel=recipe.get(f"{megatron}.sequence_parallel", False),
        training_gpus=training,
        generation_gpus=generation,
        vllm_tensor=size_of(recipe, f"{vllm}.tensor_parallel_size"),
        vllm_pipeline=size_of(recipe, f"{vllm}.pipeline_parallel_size"),
    )


def size_of(recipe: Composed, key: str, default: int = 1) -> int:
    """A whole number of a recipe's; RecipeError where it is none, or less than ``default`` or 1."""
    value = recipe.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < min(default, 1):
        raise RecipeError(f"{key} must be a whole number of at least {min(default, 1)}, not {value!r}")
    return value


def ignored_faults(recipe: Composed) -> list[str]:
    """What NeMo-RL would start with, and not do as the recipe means; empty if none is known."""
    found = []
    if not recipe.get("policy.megatron_cfg.enabled") or recipe.get("policy.dtensor_cfg.enabled"):
        found.append("policy.megatron_cfg.enabled must be true and policy.dtensor_cfg.enabled false")
    if recipe.get("policy.optimizer") is not None:
        found.append(
            "policy.optimizer is DTensor's, and the Megatron backend ignores it: put the learning rate into "
            "policy.megatron_cfg.optimizer.lr and leave policy.optimizer null"
        )
    samples = recipe.get("grpo.val_num_generations_per_prompt", 1)
    if recipe.get("checkpointing.metric_name") == "val:pass_k" and samples == 1:
        found.append("checkpointing.metric_name val:pass_k needs grpo.val_num_generations_per_prompt > 1")
    if samples != 1 and recipe.get("policy.generation.temperature", 1.0) == 0:
        found.append(
            f"grpo.val_num_generations_per_prompt is {samples} and policy.generation.temperature 0: all samples would "
            "be the same"
        )
    validates = (
        recipe.get("grpo.val_period") or recipe.get("grpo.val_at_start") or recipe.get("grpo.val_at_end")
    )
    if validates and not recipe.get("env.should_use_nemo_gym"):
        prompts, batch = size_of(recipe, "grpo.max_val_samples", 0), size_of(recipe, "grpo.val_batch_size", 0)
        if not prompts or prompts < batch:
            found.append(
                f"grpo.max_val_samples {prompts} holds no batch of grpo.val_batch_size {batch}: NeMo-RL validates "
                "whole batches only, and would report accuracy 0"
            )
    return found


def size_faults(recipe: Composed, sizes: Layout) -> list[str]:
    """Sizes that do not divide each other, for where NeMo-RL cannot say so itself."""
    found = []
    ways = f"tensor {sizes.tensor} x pipeline {sizes.pipeline} x context {sizes.context} = {sizes.model_parallel}"
    if sizes.training_gpus <= 0 or sizes.training_gpus % sizes.model_parallel:
        found.append(
            f"{ways} does not divide the {sizes.training_gpus} training GPUs "
            f"({sizes.num_nodes} nodes x {sizes.gpus_per_node}); change policy.megatron_cfg or cluster.num_nodes"
        )
    vllm = sizes.vllm_tensor * sizes.vllm_pipeline
    if sizes.generation_gpus <= 0 or sizes.generation_gpus % vllm:
        found.append(
            f"policy.generation.vllm_cfg: tensor {sizes.vllm_tensor} x pipeline {sizes.vllm_pipeline} does not divide "
            f"the {sizes.generation_gpus} GPUs that generate"
        )
    prompts, per_prompt = "grpo.num_prompts_per_step", "grpo.num_generations_per_prompt"
    rollouts = size_of(recipe, prompts) * size_of(recipe, per_prompt)
    batch, ranks = size_of(recipe, "policy.train_global_batch_size"), max(1, sizes.data_parallel)
    if rollouts % batch:
        found.append(
            f"{prompts} x num_generations_per_prompt = {rollouts} rollouts are no multiple of "
            f"policy.train_global_batch_size {batch}"
        )
    found += [
        f"{name} {size} is not divisible by {ranks} data-parallel ranks"
        for name, size in (
            ("policy.train_global_batch_size", batch),
            (f"{prompts} x {per_prompt} =", rollouts),
        )
        if size % ranks
    ]
    return found


def data_sets(recipe: Composed) -> list[tuple[str, dict[str, Any]]]:
    """(dotted key, settings) of every training and validation data set, with data.default filled in."""
    found = []
    for part in ("data.train", "data.validation"):
        value = recipe.get(part)
        entries = (
            {part: value}
            if isinstance(value, dict)
            else {f"{part}.{i}": v for i, v in enumerate(value or [])}
        )
        found += [(where, {**recipe.get("data.default", {}), **entry}) for where, entry in entries.items()]
    return found
