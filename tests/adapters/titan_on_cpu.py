"""torchtitan's own program on CPU ranks: ``python -m torch.distributed.run -m tests.adapters.titan_on_cpu ...``.

Replaced at the edge: the device that torchtitan finds, what it asks about its memory, NCCL's scaled sums, and
FlexAttention's kernel, which has no backward on a CPU; attention is torch's other
one there, under torchtitan's own mask.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import create_block_mask, create_mask

torch._utils._get_available_device_type = lambda: "cpu"
torch.cpu.current_device = lambda: 0  # "cpu" otherwise
vars(torch.cpu).update(
    get_device_name=lambda _: "CPU",
    get_device_properties=lambda _: SimpleNamespace(total_memory=1),
    memory_stats=lambda _: {},
    reset_peak_memory_stats=lambda: None,
    empty_cache=lambda: None,
)

from torchtitan import train  # noqa: E402
from torchtitan.models.common import attention  # noqa: E402


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block_mask: Any,
    enable_gqa: bool,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """flex_attention's answer, [B, N, L, H], without its kernel."""
    rows, _, length, _ = query.shape
    mask = create_mask(block_mask.mask_mod, rows, 1, length, length, device="cpu")
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=enable_gqa
    ), None


def main() -> None:
    attention.FlexAttention._compiled_flex_attn = staticmethod(attend)
    attention._compiled_create_block_mask = create_block_mask
    divide = FSDPModule.set_gradient_divide_factor

    def divide_apart(module: FSDPModule, factor: float) -> None:
        divide(module, factor)
        module.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = divide_apart  # type: ignore[method-assign]
    train.main()


if __name__ == "__main__":
    main()
