"""PEAR in slime: three functions that slime's command line takes by their path (docs/adapters/slime.md).

    --rollout-function-path pear_megatron.adapters.slime.generate_rollout
    --rollout-data-postprocess-path pear_megatron.adapters.slime.postprocess_rollout_data
    --loss-type custom_loss --custom-loss-function-path pear_megatron.adapters.slime.loss_function

Their settings are ``pear_*`` keys in the YAML file of ``--custom-config-path``. Read at slime's commit 624b824a8.
"""

from pear_megatron.adapters.slime.loss import loss_function, postprocess_rollout_data
from pear_megatron.adapters.slime.rollout import generate_rollout

__all__ = ["generate_rollout", "loss_function", "postprocess_rollout_data"]
