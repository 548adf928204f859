"""Layout: the one object that knows which rank this is, and which groups it belongs to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch

from pear_megatron.megatron import cpu
from pear_megatron.recipe import ModelConfig, ParallelConfig, TrainConfig, check_layout

_VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class Layout:
    """Ranks, sizes and process groups of a run; built once by ``initialize``."""

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

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Columns of the output layer over all ranks: a multiple of 128 x TP, as Megatron pads."""
        multiple = _VOCAB_MULTIPLE * self.tp_size
        return -(-vocab_size // multiple) * multiple

    @property
    def reports(self) -> bool:
        """Whether this rank's loss counts: of the last stage's tensor-parallel ranks, which agree, the first."""
        return self.is_last_stage and self.tp_group.rank() == 0


def initialize(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> Layout:
    """Starts torch.distributed and Megatron's process groups from torchrun's environment.

    Raises:
        RecipeError: the recipe's sizes do not fit the number of processes.
    """
    on_cpu = cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's rule for TP overlap
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if "RANK" not in os.environ:  # plain `python -m`: a world of one
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dp_size = check_layout(model, parallel, train, int(os.environ["WORLD_SIZE"]))
    if on_cpu:
        device, backend = torch.device("cpu"), "gloo"
    else:
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
    )
    if not on_cpu:
        model_parallel_cuda_manual_seed(0)  # dropout is 0; initial weights come from initialize_weights
    return Layout(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_rank=local_rank,
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
    )


def shutdown() -> None:
    """Leaves Megatron's process groups and torch.distributed."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
