"""The transformers example under FSDP or DeepSpeed on CPU processes: both start their own way on GPUs alone."""

from __future__ import annotations

import sys
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

from examples.transformers.sft_pear import main

_initialize = state.AcceleratorState.__init__


def _initialize_with_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
    """accelerate's, then what it does of an FSDP plugin on GPUs."""
    _initialize(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin
        state.PartialState._shared_state["distributed_type"] = self.distributed_type


if __name__ == "__main__":
    if any(argument.startswith("--deepspeed") for argument in sys.argv):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    state.AcceleratorState.__init__ = _initialize_with_fsdp
    main(sys.argv[1:])
