"""GPUS: memory and peak FLOP/s of the GPUs that ``cluster.gpu`` names."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True)
class Gpu:
    """A GPU as ``plan`` and the MFU see it.

    Attributes:
        memory: bytes that torch can have, as ``torch.cuda.mem_get_info`` says on an empty card.
        bf16_flops: peak bfloat16 FLOP/s of the tensor cores, dense, from the vendor's data sheet.
    """

    memory: int
    bf16_flops: float


GPUS = {
    "A100-80GB": Gpu(memory=int(79.1 * GIB), bf16_flops=312e12),
    "H100-80GB": Gpu(memory=int(79.1 * GIB), bf16_flops=989e12),
    "H200-141GB": Gpu(memory=int(139.7 * GIB), bf16_flops=989e12),
    "B200-180GB": Gpu(memory=int(178.3 * GIB), bf16_flops=2250e12),
}  # "cpu" is none of them: nothing is known of it
