"""remedies: the smallest changes of a recipe that make it fit its GPUs, found by trying them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pear_megatron.plan.gpus import GPUS
from pear_megatron.plan.memory import stage_memory
from pear_megatron.recipe import Recipe, RecipeError, check_layout

_FULL_RECOMPUTE = {
    "train.recompute_granularity": "full",
    "train.recompute_method": "uniform",
    "train.recompute_num_layers": 1,
}
_CHUNK_TOKENS = 2048  # rows enough to keep the output layer's GEMM busy
_MOST_NODES = 64


@dataclass(frozen=True)
class Remedy:
    """A change under which the recipe fits.

    Attributes:
        overrides: dotted keys and their new values.
        memory: bytes that the fullest rank then needs.
    """

    overrides: dict[str, Any]
    memory: int

    @property
    def same_gpus(self) -> bool:
        """Whether it needs no more GPUs."""
        return not any(key.startswith("cluster.") for key in self.overrides)

    def __str__(self) -> str:
        return " ".join(f"{key}={_as_override(value)}" for key, value in self.overrides.items())


def _as_override(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def fits(recipe: Recipe) -> int | None:
    """Bytes that the fullest rank needs, or None where sizes do not go together or exceed the GPU's memory."""
    try:
        dp_size = layout(recipe)
    except RecipeError:
        return None
    needed = max(stage.total for stage in stage_memory(recipe, dp_size))
    gpu = GPUS.get(recipe.cluster.gpu)
    return needed if gpu is None or needed <= gpu.memory else None


def layout(recipe: Recipe) -> int:
    """The data-parallel size on the recipe's own cluster; RecipeError where its sizes do not fit."""
    cluster = recipe.cluster
    return check_layout(
        recipe.model,
        recipe.parallel,
        recipe.train,
        cluster.num_nodes * cluster.gpus_per_node,
        seq_length=recipe.data.seq_length,
        ranks=f"GPU(s) of {cluster.num_nodes} node(s) of {cluster.gpus_per_node}",
    )


def remedies(recipe: Recipe) -> list[Remedy]:
    """Up to two ways out: other settings on the same GPUs, and the same settings on more GPUs."""
    cheapest_first = sorted(_same_gpus(recipe), key=lambda pair: pair[0])
    found = [_first(recipe, (change for _, change in cheapest_first)), _first(recipe, _more_gpus(recipe))]
    return [remedy for remedy in found if remedy is not None]


def _first(recipe: Recipe, changes: Iterator[dict[str, Any]]) -> Remedy | None:
    return next((remedy for change in changes if (remedy := _try(recipe, change)) is not None), None)


def _try(recipe: Recipe, change: dict[str, Any]) -> Remedy | None:
    """The change, without what the recipe has already, if the recipe then fits."""
    values = recipe.model_dump(mode="json")
    overrides = {}
    for key, value in change.items():
        section, name = key.split(".")
        if values[section][name] != value:
            values[section][name] = overrides[key] = value
    try:
        memory = fits(Recipe.model_validate(values))
    except ValidationError:
        return None
    return None if memory is None or not overrides else Remedy(overrides, memory)


def _same_gpus(recipe: Recipe) -> Iterator[tuple[float, dict[str, Any]]]:
    """Changes with what they cost in speed and surprise, roughly: a doubling of TP or PP 1, recomputation 1.5."""
    parallel, train, cluster = recipe.parallel, recipe.train, recipe.cluster
    sizes = [n for n in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % n == 0]
    stages = [n for n in range(1, recipe.model.num_layers + 1) if recipe.model.num_layers % n == 0]
    current = {key: getattr(train, key.removeprefix("train.")) for key in _FULL_RECOMPUTE}
    virtual = parallel.virtual_pipeline_model_parallel_size
    for tp, pp, rows, recompute, chunk, sequence, distributed in itertools.product(
        sizes,
        stages,
        {1, train.micro_batch_size},
        (current, _FULL_RECOMPUTE),
        {train.output_chunk_tokens, train.output_chunk_tokens or _CHUNK_TOKENS},
        {parallel.sequence_parallel, train.precision == "bf16"},
        {parallel.use_distributed_optimizer, True},
    ):
        cost = abs(math.log2(tp / parallel.tensor_model_parallel_size))
        cost += abs(math.log2(pp / parallel.pipeline_model_parallel_size))
        cost += 0.5 * (rows != train.micro_batch_size) + 1.5 * (recompute != current)
        cost += 0.7 * (chunk != train.output_chunk_tokens)  # the output layer's GEMM once more
        cost += 0.1 * (sequence != parallel.sequence_parallel)
        cost += 0.1 * (distributed != parallel.use_distributed_optimizer)
        change = {
            "parallel.tensor_model_parallel_size": tp,
            "parallel.pipeline_model_parallel_size": pp,
            "parallel.virtual_pipeline_model_parallel_size": virtual if pp > 1 else None,
            "parallel.sequence_parallel": sequence and tp > 1,
            "parallel.use_distributed_optimizer": distributed,
            "train.micro_batch_size": rows,
            "train.output_chunk_tokens": chunk,
            **recompute,
        }
        if recipe.model.num_moe_experts is None:
            yield cost, change
            continue
        for ep in sizes:  # experts whole, as Megatron-Core has them where a rank holds all of them
            more = cost + abs(math.log2(ep / parallel.expert_model_parallel_size))
            experts = {
                "parallel.expert_model_parallel_size": ep,
                "parallel.expert_tensor_parallel_size": 1 if ep > 1 else None,
            }
            yield more, {**change, **experts}


def _more_gpus(recipe: Recipe) -> Iterator[dict[str, Any]]:
    cluster = recipe.cluster
    for gpus in range(cluster.gpus_per_node + 1, 9):
        yield {"cluster.gpus_per_node": gpus}
    for nodes in range(cluster.num_nodes + 1, _MOST_NODES + 1):
        yield {"cluster.num_nodes": nodes, "cluster.gpus_per_node": max(8, cluster.gpus_per_node)}
