"""What benchmarks/step.py trains: models of two sizes, the losses that are compared, a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pear_megatron import PearConfig
from pear_megatron.data.batches import PackedBatch
from pear_megatron.megatron.forward_step import LossOutput, PearForwardStep
from pear_megatron.recipe import ModelConfig

COMMON: dict[str, Any] = {"max_position_embeddings": 1 << 20, "share_embeddings_and_output_weights": True}
MODELS = {
    "tiny": ModelConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=8000, **COMMON
    ),
    # Sizes of Qwen2.5-0.5B and Llama-3.2-1B.
    "0.5b": ModelConfig(
        num_layers=24,
        hidden_size=896,
        ffn_hidden_size=4864,
        num_attention_heads=14,
        num_query_groups=2,
        vocab_size=151936,
        **COMMON,
    ),
    "1b": ModelConfig(
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=128256,
        **COMMON,
    ),
}


class MegatronLoss(PearForwardStep):
    """Plain SFT as Megatron does it: the model computes the loss of every token from ``labels``."""

    def __call__(
        self, data_iterator: Iterator[PackedBatch], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], LossOutput]]:
        batch = next(data_iterator)
        inputs = self._inputs(batch)
        labels = batch.labels.clamp_min(0).view(inputs["input_ids"].shape)

        def loss(per_token: Tensor) -> LossOutput:
            mask = batch.loss_mask.view(-1)
            total = torch.dot(per_token.float().view(-1), mask.float())
            return total, mask.sum(dtype=torch.int32), {}

        return model(**inputs, labels=labels), loss


def forward_steps(
    vocab_size: int, tp_group: Any, chunk_tokens: int
) -> dict[str, tuple[PearForwardStep, bool]]:
    """Name -> (what Megatron's schedule calls, whether Megatron's fused cross entropy is on)."""
    common = {"vocab_size": vocab_size, "tp_group": tp_group, "packed_attention": "thd"}
    plain, chunks = PearConfig(variant="none"), f"in chunks of {chunk_tokens}"
    chunked = {**common, "output_chunk_tokens": chunk_tokens}
    return {
        "Megatron-Core": (MegatronLoss(plain, **common), False),
        "Megatron-Core, fused": (MegatronLoss(plain, **common), True),
        "ours, variant none": (PearForwardStep(plain, **common), False),
        "ours, PEAR token": (PearForwardStep(PearConfig(), **common), False),
        "ours, PEAR block": (PearForwardStep(PearConfig(variant="block"), **common), False),
        f"ours, PEAR token, {chunks}": (PearForwardStep(PearConfig(), **chunked), False),
    }


def random_batch(tokens: int, vocab_size: int, device: torch.device) -> PackedBatch:
    """One row of four trajectories, of which the first quarter is prompt."""
    length = tokens // 4
    labels = torch.randint(vocab_size, (1, tokens))
    mask = (torch.arange(tokens) % length >= length // 4).view(1, -1)
    batch = PackedBatch(
        tokens=torch.randint(vocab_size, (1, tokens)),
        labels=labels.where(mask, -100),
        loss_mask=mask,
        behavior_logprobs=(-12 - torch.rand(1, tokens)).where(mask, 0.0),
        position_ids=(torch.arange(tokens) % length).view(1, -1),
        padding_mask=torch.zeros(1, tokens, dtype=torch.bool),
        cu_seqlens=torch.arange(0, tokens + 1, length, dtype=torch.int32),
        reward=torch.ones(4),
        trajectory_index=torch.arange(4),
        max_seqlen=length,
    )
    return batch.to(device)
