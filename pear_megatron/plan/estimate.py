"""make_plan: whether a recipe fits its GPUs, and how long it will take, from the recipe alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pear_megatron.plan.disk import RunDisk, run_disk
from pear_megatron.plan.flops import training_flops
from pear_megatron.plan.gpus import GIB, GPUS
from pear_megatron.plan.length import RunLength
from pear_megatron.plan.memory import StageMemory, stage_memory
from pear_megatron.plan.parameters import active_parameters, model_parameters
from pear_megatron.plan.remedies import Remedy, layout, remedies
from pear_megatron.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Plan:
    """What a run of a recipe will take.

    Attributes:
        gpus: GPUs of the cluster.
        parameters: of the model, without padding of the vocabulary.
        active_parameters: those that a token meets; fewer in a mixture of experts.
        dp_size, num_microbatches: data-parallel size, and micro-batches a step on each of its ranks.
        bubble: share of the time in which a pipeline stage waits at the ends of a step.
        stages: peak memory of every pipeline stage's ranks.
        memory: bytes that a GPU has; None on CPU, where nothing is checked.
        length: the run's tokens and steps; None where they are not known.
        step_seconds: expected duration of a step; None on CPU.
        mfu: the model-FLOPs utilisation that this assumes.
        disk: what its checkpoints take.
    """

    recipe: Recipe
    gpus: int
    parameters: int
    active_parameters: int
    dp_size: int
    num_microbatches: int
    bubble: float
    stages: list[StageMemory]
    memory: int | None
    length: RunLength | None
    step_seconds: float | None
    mfu: float
    disk: RunDisk

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Whether every stage fits its GPU."""
        return self.memory is None or self.fullest.total <= self.memory

    @cached_property
    def remedies(self) -> list[Remedy]:
        """Changes under which the recipe fits, where it does not."""
        return [] if self.fits else remedies(self.recipe)

    @property
    def hours(self) -> float | None:
        """Expected duration of the run."""
        if self.length is None or self.step_seconds is None:
            return None
        return self.length.steps * self.step_seconds / 3600

    def check(self) -> None:
        """RecipeError if the recipe does not fit: what a rank needs, item by item, and what would fit."""
        if self.memory is None or self.fits:
            return
        stage, count = self.fullest, len(self.stages)
        needs = ", ".join(f"{name} {size / GIB:.1f}" for name, size in stage.items.items() if size > 0)
        raise RecipeError(
            f"does not fit on {_gpus(self.recipe)}: a rank of pipeline stage {stage.stage + 1} of {count} needs "
            f"{stage.total / GIB:.1f} GiB, a GPU has {self.memory / GIB:.1f} ({needs}); "
            + _way_out(self.recipe, self.remedies)
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it; bytes and seconds."""
        parallel = self.recipe.parallel
        return {
            "fits": self.fits,
            "remedies": [remedy.overrides for remedy in self.remedies],
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "gpu": self.recipe.cluster.gpu,
            "gpus": self.gpus,
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "context_parallel_size": parallel.context_parallel_size,
            "expert_model_parallel_size": parallel.expert_model_parallel_size,
            "data_parallel_size": self.dp_size,
            "num_microbatches": self.num_microbatches,
            "pipeline_bubble": self.bubble,
            "memory_per_gpu": self.memory,
            "stages": [{**asdict(stage), "total": stage.total} for stage in self.stages],
            "disk": {**asdict(self.disk), "checkpoint": self.disk.checkpoint},
            "run": None if self.length is None else asdict(self.length),
            "mfu_assumed": self.mfu,
            "step_seconds": self.step_seconds,
            "hours": self.hours,
            "gpu_hours": None if self.hours is None else self.hours * self.gpus,
        }


def make_plan(recipe: Recipe, *, length: RunLength | None = None, mfu: float = 0.4) -> Plan:
    """Plans a run on the recipe's ``cluster``; needs no GPU, no weights and no data.

    Where the length of its data is not known, steps are taken to be full rows. ``mfu`` is the model-FLOPs utilisation
    to expect, as training reports it.

    Raises:
        RecipeError: its sizes do not fit together or not the cluster; names what would fit.
    """
    cluster, parallel, train = recipe.cluster, recipe.parallel, recipe.train
    try:
        dp_size = layout(recipe)
    except RecipeError as error:
        raise RecipeError(f"{error}; {_way_out(recipe, remedies(recipe))}") from error
    gpu = GPUS.get(cluster.gpu)
    gpus = cluster.num_nodes * cluster.gpus_per_node
    if length is None:
        row = training_flops(recipe.model, [recipe.data.seq_length], frozen=recipe.lora is not None)
        step_flops = float(train.global_batch_size * row)
    else:
        step_flops = length.flops / length.steps
    num_microbatches = train.global_batch_size // (train.micro_batch_size * dp_size)
    idle = parallel.pipeline_model_parallel_size - 1
    busy = num_microbatches * (parallel.virtual_pipeline_model_parallel_size or 1)
    return Plan(
        recipe=recipe,
        gpus=gpus,
        parameters=model_parameters(recipe.model),
        active_parameters=active_parameters(recipe.model),
        dp_size=dp_size,
        num_microbatches=num_microbatches,
        bubble=idle / (busy + idle),
        stages=stage_memory(recipe, dp_size),
        memory=gpu.memory if gpu else None,
        length=length,
        step_seconds=step_flops / (mfu * gpu.bf16_flops * gpus) if gpu else None,
        mfu=mfu,
        disk=run_disk(recipe, length.steps if length else train.max_steps),
    )


def _gpus(recipe: Recipe) -> str:
    cluster = recipe.cluster
    return f"{cluster.num_nodes} node(s) of {cluster.gpus_per_node} {cluster.gpu}"


def _way_out(recipe: Recipe, found: list[Remedy]) -> str:
    ways = "; or ".join(str(remedy) for remedy in found)
    if found and found[0].same_gpus:
        return f"what fits: {ways}"
    nothing = f"no layout fits on {_gpus(recipe)}, recomputed or not"
    if not found:
        return f"{nothing}; use larger GPUs, many more, or a shorter data.seq_length"
    return f"{nothing}; what fits: {ways}"
