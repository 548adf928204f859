"""Writing safetensors tensor by tensor: headers come from shapes alone, so no file is ever in memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pear_megatron.errors import RecipeError

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class TensorSize:
    """Name, shape and type of a tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes of a size like 5GB, 500MB or 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise RecipeError(f"{text!r} is no size; write it like 5GB, 500MB or 2GiB")
    return size


def plan_files(sizes: Iterable[TensorSize], largest: int) -> dict[str, list[TensorSize]]:
    """File name -> tensors in it, in order: each file as full as it may be, a larger tensor alone in one.

    Names are those of ``save_pretrained``.
    """
    files: list[list[TensorSize]] = [[]]
    filled = 0
    for size in sizes:
        if files[-1] and filled + size.bytes > largest:
            files.append([])
            filled = 0
        files[-1].append(size)
        filled += size.bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": file
        for number, file in enumerate(files, start=1)
    }


def index_of(files: dict[str, list[TensorSize]]) -> dict[str, object]:
    """The content of model.safetensors.index.json."""
    return {
        "metadata": {"total_size": sum(size.bytes for file in files.values() for size in file)},
        "weight_map": {size.name: name for name, file in files.items() for size in file},
    }


def write_file(path: Path, sizes: Sequence[TensorSize], tensors: Iterable[Tensor]) -> None:
    """Writes one safetensors file; tensors are taken one at a time and cast to the type announced."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for size in sizes:
        end = offset + size.bytes
        header[size.name] = {
            "dtype": _NAMES[size.dtype], "shape": list(size.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants its data aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for size, tensor in zip(sizes, tensors, strict=True):
            if tuple(tensor.shape) != size.shape:
                raise ValueError(f"{size.name} was announced as {size.shape} and is {tuple(tensor.shape)}")
            flat = tensor.to(size.dtype).contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().data)
