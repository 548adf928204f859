"""What a checkpoint's pickles may name: looked at before torch or Megatron-Core unpickle them, for it may be anybody's.

.metadata    torch's index of the shards, which torch reads with pickle.load: a few classes of its own, nothing else
common.pt    read with weights_only=True: plain values, tensors, the classes on Megatron-Core's list; since 0.19 it is
             an object among the shards
*.distcp     tensors are read with weights_only=True; objects, such as random states, are not, so they are tried first
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from pear_megatron.errors import CheckpointError
from pear_megatron.storage import is_name

INDEX = ".metadata"
_COMMON = "common.pt"
_COMMON_KEY = "common_state/shard_0_1"
_DCP = "torch.distributed.checkpoint"
_OF_AN_INDEX = {
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        (f"{_DCP}.planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}  # fmt: skip
# Of Transformer Engine's own state of an FP8 layer, which it unpickles by itself.
_EXTRA_STATE = "_extra_state"
_OF_EXTRA_STATE = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    *(
        ("transformer_engine.common.recipe", name)
        for name in (
            "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling",
            "Format", "_FormatHelper", "MMParams", "QParams",
        )
    ),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
}  # fmt: skip
# How a pickle holds tensors; the second is what Megatron-Core 0.19 puts in the first one's place.
_STORAGES = (("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes"))
# A ShardedObject's unique key. No tensor's key is like it, so what is loaded as an object was tried as one.
_OBJECT_KEY = re.compile(r".+/shard_[\d.]+_[\d.]+", re.DOTALL)


class _Unpickler(pickle.Unpickler):
    """Unpickles what names no class but those allowed, and torch's dtypes."""

    def __init__(self, file: IO[bytes], allowed: Collection[tuple[str, str]]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGES:
            return _tensors_alone
        found = getattr(torch, name, None) if module == "torch" else None
        if (module, name) in self._allowed or isinstance(found, torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which has no business there; nothing was run"
        )


def _tensors_alone(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint's shards, all of which are files of its folder.

    Raises:
        CheckpointError: it cannot be read, names a class that no index needs, or files elsewhere.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = _Unpickler(file, _OF_AN_INDEX).load()
        if not isinstance(index, Metadata):
            raise ValueError(f"it holds a {type(index).__name__}")
        _check_index(index)
        files = {place.relative_path for place in index.storage_data.values()}
    except Exception as error:  # whatever unpickling a damaged file raises
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    for name in files:
        if not is_name(name):
            raise CheckpointError(
                f"{path} names {name!r}, which is no file of that folder; nothing was read from it"
            )
    return index


def _check_index(index: Metadata) -> None:
    """Raises ValueError where torch might read something else by the index than what is tried here."""
    if type(index.storage_data) is not dict or type(index.state_dict_metadata) is not dict:
        raise ValueError("its tables are no plain dicts")  # whose methods a pickle cannot replace
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata) and not _OBJECT_KEY.fullmatch(key):
            raise ValueError(f"it calls {key} an object, which torch would unpickle in a tensor's place")
    for place in index.storage_data.values():
        if getattr(place, "transform_descriptors", None):  # torch before 2.7 has none
            raise ValueError(f"{place.relative_path} is compressed, which Megatron-Core does not do")


def read_common(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside its shards.

    Raises:
        CheckpointError: it cannot be read, is of another format, or holds more than plain values.
    """
    import megatron.core.dist_checkpointing  # noqa: F401 - its list of classes

    try:
        described = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        kind = described.get("sharded_backend"), described.get("common_backend", "torch")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'metadata.json'} cannot be read: {error}") from error
    if kind != ("torch_dist", "torch"):
        raise CheckpointError(
            f"{folder} is in the format {kind[0]!r}; torch_dist is read here: have the program that wrote it save it so"
        )
    path = folder / _COMMON
    if not path.is_file():
        return _common_among_shards(folder)
    try:
        common = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {_why(error)}") from error
    if not isinstance(common, dict):
        raise CheckpointError(f"{path} cannot be read: it holds a {type(common).__name__}")
    return common


def _common_among_shards(folder: Path) -> dict[str, Any]:
    """The same of Megatron-Core 0.19, which keeps it as an object among the shards."""
    found = _objects(folder, [_COMMON_KEY]).get(_COMMON_KEY)
    if isinstance(found, io.BytesIO):
        found = _tensors_alone(found.getvalue())
    if not isinstance(found, list) or not found or not isinstance(found[0], dict):
        raise CheckpointError(f"{folder} has neither {_COMMON} nor an object {_COMMON_KEY} of plain values")
    return found[0]


def check_objects(folder: Path, keys: Collection[str]) -> None:
    """Tries the objects among the shards that are about to be loaded.

    Args:
        folder: the checkpoint's.
        keys: unique keys of Megatron-Core's ShardedObjects.

    Raises:
        CheckpointError: the index is wrong, or an object holds more than plain values and tensors.
    """
    _objects(folder, keys)


def _objects(folder: Path, keys: Collection[str]) -> dict[str, Any]:
    import megatron.core.dist_checkpointing  # noqa: F401 - its list of classes

    found: dict[str, Any] = {}
    stored = read_index(folder).storage_data
    for key in sorted(keys):
        place = stored.get(MetadataIndex(key))  # as torch looks it up
        if place is None:
            continue  # Megatron-Core says what is missing
        path = folder / place.relative_path
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                found[key] = _tensors_alone(file.read(place.length))
            if _EXTRA_STATE in key:
                _check_extra_states(found[key])
        except Exception as error:
            raise CheckpointError(f"{path}: object {key} cannot be read: {_why(error)}") from error
    return found


def _check_extra_states(found: Any) -> None:
    if type(found) is not list:
        raise ValueError(f"it is a {type(found).__name__}; Megatron-Core stores a list")
    for state in found:
        _check_extra_state(state)


def _check_extra_state(state: Any) -> None:
    """Bytes in a tensor of any dtype, which Transformer Engine unpickles, or a file in memory, which it torch.loads."""
    if isinstance(state, io.BytesIO) and state.getvalue():
        _check_extra_state(_tensors_alone(state.getvalue()))
    elif isinstance(state, torch.Tensor) and state.numel():
        content = state.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        _Unpickler(io.BytesIO(content), _OF_EXTRA_STATE).load()


def _why(error: Exception) -> str:
    """Of torch's page of advice, which tells to run it all the same, the name of what it refused."""
    refused = re.search(r"unsupported (?:global: )?GLOBAL (\S+)", str(error), re.IGNORECASE)
    if refused:
        return f"it names {refused[1]}, which is neither a plain value nor a tensor; nothing was run"
    if "weights_only" in str(error):
        return "it holds more than plain values and tensors; nothing was run"
    return str(error).partition("\n")[0] or repr(error)
