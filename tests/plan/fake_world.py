"""A rank of a recipe's real world, in one process: torch's fake process group, parameters on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from pear_megatron.recipe.sections import expert_tensor_size
from tests.plan import recipes


@dataclass(frozen=True)
class BuiltRank:
    """What Megatron-Core allocates on a rank; counts of elements, padding of its buffers apart."""

    stage: int
    parameters: int
    weights: int
    gradients: int
    padding: int


def _layout(recipe: Any, rank: int) -> Any:
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pear_megatron.megatron.layout import Layout

    parallel, cluster = recipe.parallel, recipe.cluster
    world = cluster.num_nodes * cluster.gpus_per_node
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(parallel),
        create_gloo_process_groups=False,
    )
    return Layout(
        rank=rank,
        world_size=world,
        local_rank=0,
        tp_size=tp,
        pp_size=pp,
        dp_size=world // (tp * pp),
        dp_rank=parallel_state.get_data_parallel_rank(),
        device=torch.device("meta"),
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        sequence_parallel=parallel.sequence_parallel,
        ep_size=parallel.expert_model_parallel_size,
        expert_tp_size=expert_tensor_size(parallel),
    )


def build_every_stage(_rank: int, name: str) -> list[BuiltRank]:
    """The first rank of each pipeline stage, built by Megatron-Core at full size; for ``run_ranks(1, ...)``."""
    from pear_megatron.megatron import cpu

    cpu.enable()
    from megatron.core import parallel_state

    from pear_megatron.megatron.model import build_model, transformer_config, wrap_ddp

    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    recipe = recipes.load(name)
    built = []
    for stage in range(recipe.parallel.pipeline_model_parallel_size):
        torch.distributed.destroy_process_group()
        stages, cluster = recipe.parallel.pipeline_model_parallel_size, recipe.cluster
        layout = _layout(recipe, stage * cluster.num_nodes * cluster.gpus_per_node // stages)
        transformer_config(recipe.model, layout, recipe.train)  # Megatron-Core's own validation
        # Its CPU layers refuse sequence parallelism, which changes no parameter.
        layout = replace(layout, sequence_parallel=False)
        with torch.device("meta"):
            model = wrap_ddp(build_model(recipe.model, layout, recipe.train), recipe.parallel)
        buffers = model.buffers + model.expert_parallel_buffers
        built.append(
            BuiltRank(
                stage=parallel_state.get_pipeline_model_parallel_rank(),
                parameters=sum(p.numel() for p in model.module.parameters()),
                weights=sum(b.numel_unpadded * b.param_data.element_size() for b in buffers),
                gradients=sum(b.numel_unpadded * b.grad_data.element_size() for b in buffers),
                padding=sum(b.numel - b.numel_unpadded for b in buffers),
            )
        )
        parallel_state.destroy_model_parallel()
    return built
