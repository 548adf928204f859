"""Throughput: a step's tokens and seconds as the figures that people compare runs by."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from pear_megatron.plan.flops import training_flops
from pear_megatron.plan.gpus import GIB, GPUS
from pear_megatron.recipe import ClusterConfig, ModelConfig

log = logging.getLogger("pear_megatron")


class Throughput:
    """Figures of a training step; call it on every rank.

    ``cluster.gpu`` names the peak that the MFU divides by; ``frozen`` weights (LoRA) take fewer FLOPs.
    """

    def __init__(
        self,
        model: ModelConfig,
        cluster: ClusterConfig,
        *,
        world_size: int,
        device: torch.device,
        frozen: bool = False,
    ) -> None:
        self.model, self.world_size, self.device, self.frozen = model, world_size, device, frozen
        self.peak = None
        if device.type == "cuda":
            self.peak = peak_flops(cluster.gpu, torch.cuda.get_device_name(device))

    def __call__(self, lengths: Sequence[int], seconds: float) -> dict[str, float]:
        """Metrics of one step on trajectories of these lengths in tokens.

        ``step_seconds`` and ``tokens_per_second``; on GPUs also ``tokens_per_second_per_gpu``,
        ``tflops_per_gpu``, ``mfu`` (where the GPU is the one that ``cluster.gpu`` names), and the fullest
        rank's ``memory_allocated_gib`` and ``memory_reserved_gib``, peaks since the start.
        """
        tokens = sum(lengths)
        figures = {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
        if self.device.type != "cuda":
            return figures
        flops = training_flops(self.model, lengths, frozen=self.frozen) / (seconds * self.world_size)
        figures["tokens_per_second_per_gpu"] = tokens / (seconds * self.world_size)
        figures["tflops_per_gpu"] = flops / 1e12
        if self.peak is not None:
            figures["mfu"] = flops / self.peak
        memory = [torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)]
        fullest = torch.tensor(memory, device=self.device)
        torch.distributed.all_reduce(fullest, torch.distributed.ReduceOp.MAX)
        allocated, reserved = fullest.tolist()
        return {**figures, "memory_allocated_gib": allocated / GIB, "memory_reserved_gib": reserved / GIB}


def peak_flops(name: str, device_name: str) -> float | None:
    """Peak bfloat16 FLOP/s of ``cluster.gpu``; None, with a warning, where CUDA's name is of another device."""
    gpu = GPUS.get(name)
    if gpu is not None and name.split("-")[0] in device_name:
        return gpu.bf16_flops
    log.warning(
        "cluster.gpu is %s and this is a %s: no MFU is reported; set cluster.gpu to one of %s",
        name,
        device_name,
        ", ".join(GPUS),
    )
    return None
