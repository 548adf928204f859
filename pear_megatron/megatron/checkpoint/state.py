"""What a checkpoint holds: a model's sharded tensors, and what a run resumes with; read and loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from pear_megatron.errors import CheckpointError
from pear_megatron.megatron.checkpoint import rng
from pear_megatron.megatron.checkpoint.restricted import check_objects, read_common
from pear_megatron.megatron.layout import Layout
from pear_megatron.megatron.lora import adapters_only, has_adapters
from pear_megatron.megatron.model import as_chunks, unwrap
from pear_megatron.megatron.optimizer import load_optimizer, load_scheduler, prepare_to_load

log = logging.getLogger("pear_megatron")

# The distributed optimizer's shards can then be loaded on another data-parallel size.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def model_state(model: Any) -> dict[str, Any]:
    """The sharded tensors of a model, or of a stage's chunks, as Megatron arranges them; of LoRA, the adapters'."""
    chunks = as_chunks(model)
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {name: _stored(unwrap(chunk)) for name, chunk in zip(names, chunks, strict=True)}


def _stored(gpt: Any) -> dict[str, Any]:
    state = gpt.sharded_state_dict()
    return adapters_only(state) if has_adapters(gpt) else state


def versions() -> dict[str, str]:
    """Of what writes and reads checkpoints."""
    import megatron.core

    found = {"megatron-core": megatron.core.__version__, "torch": torch.__version__}
    return {name: str(version).partition("+")[0] for name, version in found.items()}  # + is of a build


def _other_versions(common: dict[str, Any]) -> str:
    """Which versions wrote a checkpoint, if they are not those that read it."""
    wrote, here = common.get("versions"), versions()
    if not isinstance(wrote, dict) or wrote == here:
        return ""
    shown = [", ".join(f"{name} {version}" for name, version in all_.items()) for all_ in (wrote, here)]
    return f"; it was written with {shown[0]}, and this is {shown[1]}: go on with the versions that wrote it"


def load(
    path: Path, model: Any, optimizer: Any = None, scheduler: Any = None, layout: Layout | None = None
) -> int:
    """Loads a checkpoint into a model on any layout, and into what a run resumes with, where given.

    Args:
        path: the checkpoint's folder.
        model: a model, wrapped or not, or a list of chunks.
        optimizer, scheduler: of the run to resume.
        layout: of the run to resume: random states are restored if it is the one that was saved.

    Returns:
        The step the checkpoint was written at; 0 if another program wrote it.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or holds more than tensors and plain values.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from torch.distributed.checkpoint.api import CheckpointException  # not an Exception

    common = read_common(path)
    state = model_state(model)
    models = list(state)
    if optimizer is not None:
        prepare_to_load(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=True, metadata=SHARDING)
    if layout is not None and common.get("layout") == rng.describe(layout):
        state["rng"] = rng.sharded_state(layout)
    objects = [value for value in nested_values(state) if isinstance(value, ShardedObject)]
    check_objects(path, {value.unique_key for value in objects})
    try:
        loaded = dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"{path} cannot be loaded into this model: {error}{_other_versions(common)}"
        ) from error
    for name, chunk in zip(models, as_chunks(model), strict=True):
        gpt = unwrap(chunk)
        gpt.load_state_dict(loaded[name], strict=not has_adapters(gpt))  # frozen weights are elsewhere
    if optimizer is not None:
        load_optimizer(optimizer, loaded["optimizer"])
    if scheduler is not None:
        load_scheduler(scheduler, loaded["scheduler"])
    if "rng" in state:
        rng.restore(loaded["rng"])
    return int(loaded.get("step", 0))  # another program's checkpoint has none
