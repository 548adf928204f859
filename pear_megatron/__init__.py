"""PEAR for Megatron-Core: an SFT loss reweighted by suffix importance ratios (arXiv 2602.01058)."""

from pear_megatron.config import PearConfig
from pear_megatron.loss import pear_linear_loss, pear_loss
from pear_megatron.ops import linear_logprob, segmented_suffix_sum, vocab_parallel_logprob
from pear_megatron.weights import importance_weights

__version__ = "0.1.0"

__all__ = [
    "PearConfig",
    "importance_weights",
    "linear_logprob",
    "pear_linear_loss",
    "pear_loss",
    "segmented_suffix_sum",
    "vocab_parallel_logprob",
]
