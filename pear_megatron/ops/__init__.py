"""The compiled ops behind PEAR, each a thin function here and a file of the same name in csrc/."""

from pear_megatron.ops.output_layer import linear_logprob
from pear_megatron.ops.statistics import vocab_parallel_logprob, vocab_parallel_topk_kl
from pear_megatron.ops.suffix_sum import segmented_suffix_sum
from pear_megatron.ops.weights import STATISTICS, pear_weights

__all__ = [
    "STATISTICS",
    "linear_logprob",
    "pear_weights",
    "segmented_suffix_sum",
    "vocab_parallel_logprob",
    "vocab_parallel_topk_kl",
]
