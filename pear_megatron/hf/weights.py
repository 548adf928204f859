"""Weights of a Hugging Face checkpoint into this rank's part of a Megatron-Core model, tensor by tensor."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pear_megatron.errors import CheckpointError
from pear_megatron.hf.mapping import parameters
from pear_megatron.recipe import ModelConfig
from pear_megatron.storage import is_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_EMBEDDING = "model.embed_tokens.weight"
_ROWS = 4096  # of a tensor in memory at a time, where two are compared
_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


class HFWeights:
    """The safetensors files of a folder, opened and checked against a model; nothing is read yet.

    Files are mapped into memory: a slice is read when it is asked for, and only the slice. Use it as a
    context manager.

    Raises:
        CheckpointError: a file is missing or truncated, or a tensor is missing, unknown, of another shape or
            of a type that is no plain float; names the file and the tensor.
    """

    def __init__(self, folder: str | Path, model: ModelConfig) -> None:
        self.folder, self.model = Path(folder), model
        self._opened = contextlib.ExitStack()
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._opened.close)
            self._slices = self._open()
            self._check()
            cleanup.pop_all()

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._slices = {}
        self._opened.close()

    @property
    def precision(self) -> str:
        """``bf16`` if that holds every tensor exactly, else ``fp32``."""
        names = {part.name for parameter in parameters(self.model) for part in parameter.parts}
        kinds = {self._slices[name][1].get_dtype() for name in names}
        return "bf16" if kinds == {"BF16"} else "fp32"

    def read(self, name: str, axis: int | None, start: int, stop: int) -> Tensor:
        """``tensor.narrow(axis, start, stop - start)``; all of it if ``axis`` is None."""
        file, tensor = self._slices[name]
        try:
            if axis is None:
                return tensor[:]
            return tensor[start:stop] if axis == 0 else tensor[:, start:stop]
        except Exception as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read: {error}") from error

    def _open(self) -> dict[str, tuple[Path, Any]]:
        """Tensor name -> its file and its slice object."""
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise CheckpointError(
                "Hugging Face checkpoints need safetensors; pip install 'pear-megatron[hf]'"
            ) from error
        found: dict[str, tuple[Path, Any]] = {}
        index = self._read_index()
        for path in sorted({self.folder / file for file in index.values()}) or [self.folder / SINGLE]:
            if not path.is_file():
                raise CheckpointError(self._missing_file(path, index))
            try:
                file = self._opened.enter_context(safe_open(path, framework="pt"))
            except Exception as error:  # safetensors' own error class has no better base
                raise CheckpointError(
                    f"{path} is not a whole safetensors file: {error}; download it again"
                ) from error
            found |= {name: (path, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
        for name, file_name in index.items():
            if name not in found or found[name][0] != self.folder / file_name:
                raise CheckpointError(
                    f"{self.folder / INDEX} puts tensor {name} into {file_name}, which does not hold it"
                )
        return found

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name; empty for a checkpoint of one file."""
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file() or not path.is_file():
            return {}
        try:
            index = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}; download it again") from error
        for name, file in index.items():
            if not is_name(file):
                raise CheckpointError(
                    f"{path} puts tensor {name} into {file!r}, which is no file's name in this folder; download it "
                    "again"
                )
        return index

    def _missing_file(self, path: Path, index: dict[str, str]) -> str:
        if index:
            return f"{path} is missing: {INDEX} names it for {sum(f == path.name for f in index.values())} tensors"
        others = sorted(file.name for file in self.folder.glob("*.bin"))
        hint = (
            f"; {others[0]} is a pickle, which is not read: save it again with transformers" if others else ""
        )
        return f"{self.folder} holds no weights: neither {SINGLE} nor {INDEX} is there{hint}"

    def _check(self) -> None:
        expected = {part.name: part.shape for parameter in parameters(self.model) for part in parameter.parts}
        for name, shape in expected.items():
            if name not in self._slices:
                raise CheckpointError(
                    f"{self.folder}: tensor {name} of shape {list(shape)} is in none of its files"
                )
            file, tensor = self._slices[name]
            if tuple(tensor.get_shape()) != shape:
                raise CheckpointError(
                    f"{file}: tensor {name} has shape {list(tensor.get_shape())}, but config.json makes it "
                    f"{list(shape)}"
                )
            if tensor.get_dtype() not in _DTYPES:
                raise CheckpointError(
                    f"{file}: tensor {name} is of type {tensor.get_dtype()}; read are {', '.join(_DTYPES)}"
                )
        for name, (file, _) in self._slices.items():
            if name not in expected and not self._is_redundant(name):
                raise CheckpointError(
                    f"{file}: tensor {name} has no place in this model; is config.json that of these weights?"
                )

    def _is_redundant(self, name: str) -> bool:
        """Tensors of older files that follow from others: rotary frequencies, and the head that is the embedding."""
        if name == "lm_head.weight" and self.model.share_embeddings_and_output_weights:
            self._check_tied(name)
            return True
        return name.endswith(".rotary_emb.inv_freq")

    def _check_tied(self, name: str) -> None:
        file, head = self._slices[name]
        _, embedding = self._slices[_EMBEDDING]
        rows = range(0, embedding.get_shape()[0], _ROWS)
        if head.get_shape() != embedding.get_shape() or any(
            not torch.equal(head[i : i + _ROWS], embedding[i : i + _ROWS]) for i in rows
        ):
            raise CheckpointError(
                f"{file}: config.json ties the output layer to the embedding (tie_word_embeddings), and {name} holds "
                "other weights, which would be lost; set tie_word_embeddings false, or take the tensor out"
            )
