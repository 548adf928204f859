"""Layout: the one object that knows which rank this is, and which groups it belongs to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch

from pear_megatron.megatron import cpu
from pear_megatron.megatron.attention import check_attention
from pear_megatron.ops.library import require_cuda_ops
from pear_megatron.recipe import ModelConfig, ParallelConfig, TrainConfig, check_layout
from pear_megatron.recipe.sections import expert_tensor_size


@dataclass(frozen=True)
class Layout:
    """Ranks, sizes and process groups of a run; built once by ``initialize``.

    Attributes:
        vpp_size: model chunks that this rank's pipeline stage holds; 1 without interleaving.
        is_first_stage, is_last_stage: of the pipeline; with interleaving, the stage's first or last chunk.
        dp_group: without the context-parallel ranks.
        ep_size, ep_rank: expert-parallel ranks, and which experts this one holds.
        expert_tp_size, expert_tp_rank: ranks that share each expert.
    """

    rank: int
    world_size: int
    local_rank: int
    tp_size: int
    pp_size: int
    dp_size: int
    dp_rank: int
    device: torch.device
    is_first_stage: bool
    is_last_stage: bool
    tp_group: torch.distributed.ProcessGroup
    pp_group: torch.distributed.ProcessGroup
    dp_group: torch.distributed.ProcessGroup
    vpp_size: int = 1
    cp_size: int = 1
    cp_group: torch.distributed.ProcessGroup | None = None
    sequence_parallel: bool = False
    tp_comm_overlap: bool = False
    ep_size: int = 1
    ep_rank: int = 0
    expert_tp_size: int = 1
    expert_tp_rank: int = 0

    @property
    def cp_rank(self) -> int:
        """Which zigzag chunks of every sequence this rank holds."""
        return self.cp_group.rank() if self.cp_group is not None else 0

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    @property
    def reports(self) -> bool:
        """Whether this rank's loss counts: of the last stage's tensor-parallel ranks, which agree, the first."""
        return self.is_last_stage and self.tp_group.rank() == 0


def join() -> torch.device:
    """Starts torch.distributed from torchrun's environment, if it was not -> this rank's device.

    Raises:
        BuildError: on a GPU, with ops that were built without CUDA.
    """
    if "RANK" not in os.environ:  # plain `python -m`: a world of one
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if cpu.enable():
        device, backend = torch.device("cpu"), "gloo"
    else:
        require_cuda_ops()
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), "nccl"
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))
    return device


def initialize(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> Layout:
    """Starts torch.distributed, if it was not, and Megatron's groups from torchrun's environment.

    Raises:
        RecipeError: the recipe's sizes do not fit the number of processes, or its layout needs a GPU or
            Transformer Engine and there is none.
        BuildError: on a GPU, with ops that were built without CUDA.
    """
    on_cpu = cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's rule for TP overlap
    started = torch.distributed.is_initialized()
    world_size = torch.distributed.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
    dp_size = check_layout(model, parallel, train, world_size)
    check_attention(parallel, train)
    device = join()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(parallel),
    )
    if not on_cpu:
        model_parallel_cuda_manual_seed(0)  # dropout is 0; initial weights come from initialize_weights
    return Layout(
        rank=torch.distributed.get_rank(),
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        tp_size=parallel.tensor_model_parallel_size,
        pp_size=parallel.pipeline_model_parallel_size,
        dp_size=dp_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        device=device,
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        vpp_size=parallel.virtual_pipeline_model_parallel_size or 1,
        cp_size=parallel.context_parallel_size,
        cp_group=parallel_state.get_context_parallel_group(),
        sequence_parallel=parallel.sequence_parallel,
        tp_comm_overlap=parallel.tp_comm_overlap,
        ep_size=parallel.expert_model_parallel_size,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_tp_size=expert_tensor_size(parallel),
        expert_tp_rank=parallel_state.get_expert_tensor_parallel_rank(),
    )


def shutdown() -> None:
    """Leaves Megatron's process groups and torch.distributed."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
