"""Planning a run: FLOPs, memory and time of a recipe, from arithmetic alone."""

from pear_megatron.plan.estimate import Plan, make_plan
from pear_megatron.plan.flops import training_flops
from pear_megatron.plan.gpus import GPUS
from pear_megatron.plan.length import RunLength, data_is_there, length_from_data, length_from_tokens

__all__ = [
    "GPUS",
    "Plan",
    "RunLength",
    "data_is_there",
    "length_from_data",
    "length_from_tokens",
    "make_plan",
    "training_flops",
]
