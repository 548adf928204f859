"""The random states of a rank, as a part of a checkpoint.

Training draws no random numbers (dropout is 0, the data order follows from the seed and the step), so a
run resumes exactly on another layout too; there the states cannot be given back to the ranks they came
from, and stay as they are.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from pear_megatron.megatron.layout import Layout


def describe(layout: Layout) -> dict[str, int]:
    """What decides which rank is which."""
    return {
        "world_size": layout.world_size,
        "tp_size": layout.tp_size,
        "pp_size": layout.pp_size,
        "cp_size": layout.cp_size,
        **({"ep_size": layout.ep_size} if layout.ep_size > 1 else {}),
    }


def sharded_state(layout: Layout) -> Any:
    """This rank's states as a ShardedObject: one entry a rank."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject(
        "rng_state", _states(), global_shape=(layout.world_size,), global_offset=(layout.rank,)
    )


def _states() -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
        states["tracker"] = get_cuda_rng_tracker().get_states()
    return states


def restore(states: dict[str, Any]) -> None:
    """Sets this rank's states to those of ``sharded_state``."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
        get_cuda_rng_tracker().set_states(states["tracker"])
