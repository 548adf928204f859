"""The losses that benchmarks/logprob.py compares: ours and everybody else's, on the same logits.

Each entry of LOSSES makes a function (logits [T, V], case) -> sum of weight * -log p over the tokens, or
raises Unavailable with the reason why it cannot run here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measure import single_process_group
from torch import Tensor

from pear_megatron import PearConfig, pear_loss, vocab_parallel_logprob


class Unavailable(Exception):
    """Why a peer is left out."""


@dataclass
class Case:
    """Inputs beside the logits; off the mask, weights are 0 and targets are 0 (or -100 in ignored)."""

    target: Tensor
    ignored: Tensor
    mask: Tensor
    weights: Tensor
    behavior: Tensor
    cu_seqlens: Tensor

    @classmethod
    def random(cls, tokens: int, columns: int, masked: float, device: torch.device) -> Case:
        mask = torch.rand(tokens, device=device) >= masked
        target = torch.randint(columns, (tokens,), device=device)
        return cls(
            target=target.where(mask, 0),
            ignored=target.where(mask, -100),
            mask=mask,
            weights=torch.rand(tokens, device=device).where(mask, 0.0),
            behavior=-torch.rand(tokens, device=device) - 11.0,
            cu_seqlens=torch.linspace(0, tokens, 9, device=device).int(),
        )


Loss = Callable[[Tensor, Case], Tensor]


def weighted(per_token: Tensor, case: Case) -> Tensor:
    return torch.dot(per_token.reshape(-1).float(), case.weights)


def ours(inplace: bool) -> Callable[[torch.device], Loss]:
    def loss(logits: Tensor, case: Case) -> Tensor:
        logprob = vocab_parallel_logprob(logits, case.target, mask=case.mask, inplace_backward=inplace)
        return -weighted(logprob, case)

    return lambda device: loss


def ours_with(variant: str) -> Callable[[torch.device], Loss]:
    config = PearConfig(variant=variant)

    def loss(logits: Tensor, case: Case) -> Tensor:
        args = (logits, case.target, case.behavior, case.mask, case.cu_seqlens, config)
        return pear_loss(*args, inplace_backward=True)[0]

    return lambda device: loss


def megatron(device: torch.device) -> Loss:
    single_process_group(device)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return lambda logits, case: weighted(
        vocab_parallel_cross_entropy(logits[:, None], case.target[:, None]), case
    )


def megatron_fused(device: torch.device) -> Loss:
    single_process_group(device)
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()

    def loss(logits: Tensor, case: Case) -> Tensor:
        return weighted(
            fused_vocab_parallel_cross_entropy(logits[:, None], case.target[:, None], group), case
        )

    return loss


def transformer_engine(device: torch.device) -> Loss:
    _needs_gpu(device)
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return lambda logits, case: weighted(parallel_cross_entropy(logits[None], case.target[None]), case)


def liger_vocab_parallel(device: torch.device) -> Loss:
    _needs_gpu(device)
    single_process_group(device)
    from liger_kernel.megatron import LigerMegatronCrossEntropy
    from megatron.core import parallel_state

    module, group = LigerMegatronCrossEntropy(), parallel_state.get_tensor_model_parallel_group()
    return lambda logits, case: weighted(module(logits[:, None], case.target[:, None], group), case)


def liger(device: torch.device) -> Loss:
    _needs_gpu(device)
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, case: weighted(liger_cross_entropy(logits, case.ignored, reduction="none"), case)


def quack(device: torch.device) -> Loss:
    _needs_gpu(device)
    from quack import cross_entropy

    return lambda logits, case: weighted(cross_entropy(logits, case.ignored, reduction="none"), case)


def cut_cross_entropy(device: torch.device) -> Loss:
    raise Unavailable("takes hidden states and the classifier's weight and makes the logits itself")


def torch_plain(logits: Tensor, case: Case) -> Tensor:
    return weighted(F.cross_entropy(logits.float(), case.ignored, reduction="none"), case)


def torch_compiled(device: torch.device) -> Loss:
    _needs_gpu(device)
    return torch.compile(torch_plain)


def _needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("needs a GPU")


LOSSES: dict[str, Callable[[torch.device], Loss]] = {
    "ours, in place": ours(inplace=True),
    "ours": ours(inplace=False),
    "pear_loss, variant none": ours_with("none"),
    "pear_loss, variant token": ours_with("token"),
    "pear_loss, variant block": ours_with("block"),
    "Megatron-Core": megatron,
    "Megatron-Core, fused": megatron_fused,
    "Transformer Engine": transformer_engine,
    "Liger, vocab-parallel": liger_vocab_parallel,
    "Liger": liger,
    "QuACK": quack,
    "cut-cross-entropy": cut_cross_entropy,
    "torch.compile": torch_compiled,
    "torch": lambda device: torch_plain,
}
