"""What NeMo-RL would stop at only after its nodes were allocated: sizes that do not fit, keys in the wrong place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """The layout of a composed recipe."""
    nodes, per_node = recipe.get("cluster.num_nodes", 1), recipe.get("cluster.gpus_per_node", 1)
    training = generation = nodes * per_node
    colocated = "policy.generation.colocated"
    if not recipe.get(f"{colocated}.enabled", True):
        whole_nodes = recipe.get(f"{colocated}.resources.num_nodes", 0) * per_node
        generation = whole_nodes if nodes > 1 else recipe.get(f"{colocated}.resources.gpus_per_node", 0)
        training -= generation
    megatron, vllm = "policy.megatron_cfg", "policy.generation.vllm_cfg"
    return Layout(
        num_nodes=nodes,
        gpus_per_node=per_node,
        tensor=recipe.get(f"{megatron}.tensor_model_parallel_size", 1),
        pipeline=recipe.get(f"{megatron}.pipeline_model_parallel_size", 1),
        context=recipe.get(f"{megatron}.context_parallel_size", 1),
        sequence_parallel=recipe.get(f"{megatron}.sequence_parallel", False),
        training_gpus=training,
        generation_gpus=generation,
        vllm_tensor=recipe.get(f"{vllm}.tensor_parallel_size", 1),
        vllm_pipeline=recipe.get(f"{vllm}.pipeline_parallel_size", 1),
    )


def problems(recipe: Composed, root: Path) -> list[str]:
    """Every reason why NeMo-RL would stop at this recipe, or would not do what it says; empty if none is known.

    Args:
        recipe: composed.
        root: the NeMo-RL checkout, in which prompt files are looked up.
    """
    found = _backend(recipe)
    sizes = layout(recipe)
    return found + _parallel(recipe, sizes) + _batches(recipe, sizes) + _lengths(recipe, sizes) + _validation(
        recipe
    ) + _data(recipe, root)  # fmt: skip


def _backend(recipe: Composed) -> list[str]:
    found = []
    if not recipe.get("policy.megatron_cfg.enabled") or recipe.get("policy.dtensor_cfg.enabled"):
        found.append("policy.megatron_cfg.enabled must be true and policy.dtensor_cfg.enabled false")
    if recipe.get("policy.optimizer") is not None:
        found.append(
            "policy.optimizer is DTensor's, and the Megatron backend ignores it: put the learning rate into "
            "policy.megatron_cfg.optimizer.lr and leave policy.optimizer null"
        )
    if recipe.get("policy.logprob_chunk_size") and not recipe.get("policy.megatron_cfg.defer_fp32_logits"):
        found.append("policy.logprob_chunk_size needs policy.megatron_cfg.defer_fp32_logits=true")
    return found


def _parallel(recipe: Composed, sizes: Layout) -> list[str]:
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
    if sizes.context > 1 and not recipe.get("policy.sequence_packing.enabled"):
        found.append("context_parallel_size > 1 needs policy.sequence_packing.enabled=true")
    train, logprob = recipe.get("policy.train_micro_batch_size"), recipe.get("policy.logprob_batch_size")
    on_policy = recipe.get("loss_fn.force_on_policy_ratio", False)
    if sizes.tensor >= 4 and train != logprob and not on_policy:
        found.append(
            f"from tensor parallel size 4 on, policy.logprob_batch_size ({logprob}) must equal "
            f"policy.train_micro_batch_size ({train}): other batches give other log-probs there"
        )
    return found


def _batches(recipe: Composed, sizes: Layout) -> list[str]:
    prompts, per_prompt = (
        recipe.get("grpo.num_prompts_per_step"),
        recipe.get("grpo.num_generations_per_prompt"),
    )
    batch, ranks = recipe.get("policy.train_global_batch_size"), max(1, sizes.data_parallel)
    rollouts = prompts * per_prompt
    shown = (
        f"grpo.num_prompts_per_step {prompts} x num_generations_per_prompt {per_prompt} = {rollouts} rollouts"
    )
    found = []
    if rollouts % batch:
        found.append(f"{shown} are no multiple of policy.train_global_batch_size {batch}")
    if recipe.get("loss_fn.force_on_policy_ratio") and rollouts != batch:
        found.append(
            f"loss_fn.force_on_policy_ratio takes one step a batch: policy.train_global_batch_size must be {rollouts}, "
            f"not {batch}"
        )
    if batch % ranks:
        found.append(
            f"policy.train_global_batch_size {batch} is not divisible by {ranks} data-parallel ranks"
        )
    if rollouts % ranks:
        found.append(f"{shown} are not divisible by {ranks} data-parallel ranks")
    return found


def _lengths(recipe: Composed, sizes: Layout) -> list[str]:
    longest = recipe.get("policy.max_total_sequence_length")
    divisor = recipe.get("policy.make_sequence_length_divisible_by", 1)
    factor = (2 * sizes.context if sizes.context > 1 else 1) * (
        sizes.tensor if sizes.sequence_parallel else 1
    )
    found = []
    if divisor % factor:
        found.append(
            f"policy.make_sequence_length_divisible_by {divisor} must be a multiple of {factor} (2 x context, times "
            "tensor with sequence parallelism)"
        )
    if recipe.get("policy.sequence_packing.enabled"):
        padded = -(-longest // divisor) * divisor
        for key in ("train_mb_tokens", "logprob_mb_tokens"):
            tokens = recipe.get(f"policy.sequence_packing.{key}", 0)
            if tokens < padded:
                found.append(f"policy.sequence_packing.{key} {tokens} holds no sequence of {padded} tokens")
    generated = recipe.get("policy.generation.vllm_cfg.max_model_len", longest)
    if generated > longest:
        found.append(
            f"policy.generation.vllm_cfg.max_model_len {generated} exceeds policy.max_total_sequence_length {longest}: "
            "such rollouts do not fit training"
        )
    return found


def _validation(recipe: Composed) -> list[str]:
    samples, found = recipe.get("grpo.val_num_generations_per_prompt", 1), []
    metric = recipe.get("checkpointing.metric_name")
    if metric == "val:pass_k" and samples < 2:
        found.append("checkpointing.metric_name val:pass_k needs grpo.val_num_generations_per_prompt > 1")
    if samples > 1 and not recipe.get("policy.generation.temperature", 1.0) > 0:
        found.append(
            f"grpo.val_num_generations_per_prompt is {samples} and policy.generation.temperature 0: all samples would "
            "be the same"
        )
    if not (
        recipe.get("grpo.val_period", 0) > 0
        or recipe.get("grpo.val_at_start")
        or recipe.get("grpo.val_at_end")
    ):
        return found
    train = recipe.get("data.train") or {}
    split = any(one.get("split_validation_size") for one in (train if isinstance(train, list) else [train]))
    if not recipe.get("data.validation") and not split:
        found.append(
            "validation has no data: give data.validation, or turn off grpo.val_period and val_at_start"
        )
    prompts, batch = recipe.get("grpo.max_val_samples"), recipe.get("grpo.val_batch_size")
    if not recipe.get("env.should_use_nemo_gym") and not (prompts and batch and prompts >= batch):
        found.append(
            f"grpo.max_val_samples {prompts} holds no batch of grpo.val_batch_size {batch}: NeMo-RL validates whole "
            "batches only, and would report accuracy 0"
        )
    return found


def _data(recipe: Composed, root: Path) -> list[str]:
    found = []
    for where, entry in data_sets(recipe):
        if not entry.get("dataset_name"):
            found.append(f"{where}.dataset_name is not given")
        if (env := entry.get("env_name")) and recipe.get(f"env.{env}") is None:
            found.append(f"{where}.env_name is {env}, and there is no section env.{env}")
        for key in ("prompt_file", "system_prompt_file"):
            if entry.get(key) and not (root / entry[key]).is_file():
                found.append(f"{where}.{key}: no file {root / entry[key]}")
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
