"""PEAR for Megatron-Core: an SFT loss reweighted by suffix importance ratios (arXiv 2602.01058)."""

from typing import TYPE_CHECKING

from pear_megatron.lazy import lazily

if TYPE_CHECKING:
    from pear_megatron.config import PearConfig
    from pear_megatron.loss import pear_linear_loss, pear_loss
    from pear_megatron.ops import (
        linear_logprob,
        segmented_suffix_sum,
        vocab_parallel_logprob,
        vocab_parallel_topk_kl,
    )
    from pear_megatron.weights import importance_weights
else:  # `pear-megatron --help`, and a mistake in a recipe, wait for no torch
    _NAMES = {
        "config": ["PearConfig"],
        "loss": ["pear_linear_loss", "pear_loss"],
        "ops": ["linear_logprob", "segmented_suffix_sum", "vocab_parallel_logprob", "vocab_parallel_topk_kl"],
        "weights": ["importance_weights"],
    }
    __getattr__, __dir__ = lazily(__name__, _NAMES)

__version__ = "0.2.0"

__all__ = [
    "PearConfig",
    "importance_weights",
    "linear_logprob",
    "pear_linear_loss",
    "pear_loss",
    "segmented_suffix_sum",
    "vocab_parallel_logprob",
    "vocab_parallel_topk_kl",
]
