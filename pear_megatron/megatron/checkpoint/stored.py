"""Parameters of a Megatron-Core torch_dist checkpoint, read one at a time without building the model.

Such a checkpoint holds whole parameters: one entry for the embedding, one for each kind of layer parameter with
the layers along its first axis (and the experts along its second), whatever parallel sizes wrote it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pear_megatron.errors import CheckpointError
from pear_megatron.hf.mapping import Parameter, parameters, part_views
from pear_megatron.megatron.checkpoint.restricted import read_index
from pear_megatron.recipe import ModelConfig

_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.target


class StoredParameters:
    """The parameters of a checkpoint, checked against a model; nothing but their sizes is read yet.

    Args:
        folder: the checkpoint, with ``.metadata`` in it.
        model: of what is stored.
        expected: the parameters that it holds; None = the model's.

    Raises:
        CheckpointError: it cannot be read, or does not hold the model's parameters and no others.
    """

    def __init__(self, folder: Path, model: ModelConfig, expected: list[Parameter] | None = None) -> None:
        self.folder = folder
        self._reader = FileSystemReader(str(folder))
        metadata = read_index(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(_MODEL_PREFIXES)
        }
        self._check(model, parameters(model) if expected is None else expected)

    def parts(self, parameter: Parameter) -> list[Tensor]:
        """The Hugging Face tensors that the parameter is made of."""
        views = part_views(parameter, self.read(parameter))
        return [view.reshape(part.shape) for view, part in zip(views, parameter.parts, strict=True)]

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Type that the parameter is stored in."""
        return self._entries[parameter.name].properties.dtype

    def read(self, parameter: Parameter) -> Tensor:
        """The whole parameter on the CPU, without the padding of the vocabulary.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        shape = whole_shape(parameter)
        size, offset = shape, (0,) * len(shape)
        stacked = [number for number in (parameter.layer, parameter.expert) if number is not None]
        size, offset = (*(1 for _ in stacked), *shape), (*stacked, *offset)
        entry = self._entries[parameter.name]
        target = torch.empty(size, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(size))
        items = create_read_items_for_chunk_list(parameter.name, entry, [chunk])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise CheckpointError(f"{self.folder} does not hold all of parameter {_place(parameter)}")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except Exception as error:  # whatever reading a damaged file raises
            raise CheckpointError(
                f"parameter {_place(parameter)} cannot be read from {self.folder}: {error!r}"
            ) from error
        return target.view(shape)

    def _check(self, model: ModelConfig, expected: list[Parameter]) -> None:
        for parameter in expected:
            entry = self._entries.get(parameter.name)
            if entry is None:
                raise CheckpointError(f"{self.folder} does not hold parameter {parameter.name}")
            layers = () if parameter.layer is None else (model.num_layers,)
            experts = () if parameter.expert is None else (model.num_moe_experts,)
            shape = (*layers, *experts, *whole_shape(parameter))
            fits = tuple(entry.size) == shape
            if parameter.padded:
                fits = entry.size[0] >= shape[0] and tuple(entry.size[1:]) == shape[1:]
            if not fits:
                raise CheckpointError(
                    f"{self.folder}: parameter {parameter.name} has shape {list(entry.size)}, but model.yaml "
                    f"makes it {list(shape)}"
                )
        if unknown := sorted(self._entries.keys() - {parameter.name for parameter in expected}):
            raise CheckpointError(f"{self.folder}: parameter {unknown[0]} is none of the model in model.yaml")


def whole_shape(parameter: Parameter) -> tuple[int, ...]:
    """Shape of a parameter of one layer or expert, before Megatron pads the vocabulary and before ranks share it."""
    rows = sum(part.shape[0] for part in parameter.parts)
    return (rows, *parameter.parts[0].shape[1:])


def _place(parameter: Parameter) -> str:
    place = parameter.name if parameter.layer is None else f"{parameter.name} of layer {parameter.layer}"
    return place if parameter.expert is None else f"{place} and expert {parameter.expert}"
