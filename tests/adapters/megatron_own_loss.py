"""The example's program with Megatron's own masked cross entropy: what ``--pear-variant none`` must equal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "megatron_lm"))
import pretrain_pear


def masked_sum(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """[B, S] losses of Megatron's output layer -> the sum over the mask, as its pretrain_gpt.py has it."""
    total = torch.sum(losses.float() * mask)
    count = mask.sum().int()
    return total, count, {"loss": torch.stack([total.detach(), count.float()])}


def forward_step(data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
    batch = next(data_iterator)
    losses = model(batch.tokens, batch.position_ids, batch.attention_mask(), labels=batch.labels)
    return losses, partial(masked_sum, batch.loss_mask)


if __name__ == "__main__":
    pretrain_pear.pear.forward_step = lambda args: forward_step
    pretrain_pear.main()
