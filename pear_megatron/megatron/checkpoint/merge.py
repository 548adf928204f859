"""Merged: a LoRA run's frozen weights with its adapters added, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pear_megatron.errors import RecipeError
from pear_megatron.hf.assets import LoraBase
from pear_megatron.hf.lora import lora_parameters, projection_of
from pear_megatron.hf.mapping import Parameter
from pear_megatron.hf.weights import HFWeights
from pear_megatron.megatron.checkpoint.model_folder import read_model_facts
from pear_megatron.megatron.checkpoint.paths import resolve
from pear_megatron.megatron.checkpoint.stored import StoredParameters
from pear_megatron.recipe import ModelConfig


class Weights(Protocol):
    """A model's weights, parameter by parameter."""

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Type that the parameter is in."""

    def parts(self, parameter: Parameter) -> list[Tensor]:
        """The Hugging Face tensors that the parameter is made of."""


class Merged:
    """W + alpha / rank * B A for every adapted projection; the product and the sum are in float32.

    Args:
        folder: the checkpoint with the adapters.
        frozen: what lora.yaml says.
        model: sizes of both.
        dtype: of the weights in training: what the frozen weights are rounded to before the sum.

    Raises:
        RecipeError: the frozen weights are not where they were, or are others.
        CheckpointError: a file cannot be read.
    """

    def __init__(self, folder: Path, frozen: LoraBase, model: ModelConfig, dtype: torch.dtype) -> None:
        self._base = open_base(frozen, model)
        self._dtype, self._scale = dtype, frozen.lora.alpha / frozen.lora.rank
        expected = lora_parameters(model, frozen.lora)
        self._adapters = StoredParameters(folder, model, expected)
        self._matrices = {(p.layer, *p.name.rsplit(".", 2)[1:]): p for p in expected}

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """That of training."""
        return self._dtype

    def parts(self, parameter: Parameter) -> list[Tensor]:
        """See Weights."""
        tensors = [tensor.to(self._dtype) for tensor in self._base.parts(parameter)]
        for i, part in enumerate(parameter.parts):
            name = projection_of(part)
            if (parameter.layer, name, "lora_A") in self._matrices:
                a, b = (
                    self._adapters.read(self._matrices[parameter.layer, name, matrix]).float()
                    for matrix in ("lora_A", "lora_B")
                )
                tensors[i] = tensors[i].float().addmm(b, a, alpha=self._scale)
        return tensors


class _HuggingFace:
    """A Hugging Face folder as Weights."""

    def __init__(self, weights: HFWeights) -> None:
        self._weights = weights

    def parts(self, parameter: Parameter) -> list[Tensor]:
        return [self._weights.read(part.name, None, 0, 0) for part in parameter.parts]


def open_base(frozen: LoraBase, model: ModelConfig) -> StoredParameters | _HuggingFace:
    """The frozen weights, which must be those of the run.

    Raises:
        RecipeError: they are not where they were, or are others.
    """
    folder = Path(frozen.base)
    if not folder.is_dir():
        raise RecipeError(
            f"the adapters belong to the model in {folder}, which is not there; put it back, or write the adapters "
            "alone with --adapter"
        )
    if read_model_facts(folder).digest != frozen.digest:
        raise RecipeError(
            f"the weights in {folder} are not those that the adapters were trained beside; put those back, or write "
            "the adapters alone with --adapter"
        )
    if (folder / "config.json").is_file():
        return _HuggingFace(HFWeights(folder, model))
    return StoredParameters(resolve(folder), model)
