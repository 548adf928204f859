"""A Megatron-Core checkpoint as a Hugging Face folder, tensor by tensor, on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pear_megatron.hf.assets import ASSETS, copy_assets, find_root, read_lora_file, read_model_file
from pear_megatron.hf.config_file import (
    config_json,
    generation_json,
    name_end_of_turn,
    rename_tokenizer_class,
)
from pear_megatron.hf.lora import PEFT_CONFIG, PEFT_WEIGHTS, lora_parameters, peft_config
from pear_megatron.hf.mapping import Parameter, parameters
from pear_megatron.hf.safetensors_files import TensorSize, index_of, plan_files, write_file
from pear_megatron.hf.weights import INDEX
from pear_megatron.megatron.checkpoint.merge import Merged, Weights
from pear_megatron.megatron.checkpoint.paths import resolve
from pear_megatron.megatron.checkpoint.stored import StoredParameters
from pear_megatron.ranks import from_main, together
from pear_megatron.recipe import RecipeError
from pear_megatron.storage import abandon, begin, naming, partial_of, publish
from pear_megatron.watch import now

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export_checkpoint(
    checkpoint: Path, output: Path, *, precision: str | None = None, max_shard_size: int = 5 * 10**9
) -> Path:
    """Writes the folder; ``AutoModelForCausalLM.from_pretrained`` opens it.

    No model is built: a rank holds one parameter at a time, with a LoRA run's adapters merged into it. Where
    torch.distributed was started, its ranks share the files. The folder appears whole or not at all, in the place
    of what may be there.

    Args:
        checkpoint: a run, its checkpoints/, one of them, or the output of ``pear-megatron convert``.
        output: the folder.
        precision: ``bf16`` or ``fp32``; None = as stored.
        max_shard_size: bytes of a safetensors file, unless one tensor is larger.

    Returns:
        the checkpoint's own folder, ``.../iter_0000020``.

    Raises:
        RecipeError, CheckpointError: on every rank: the checkpoint cannot be read, no architecture fits its
            model, or the folder cannot be written.
    """
    root, folder = find_root(checkpoint), resolve(checkpoint)
    if output.resolve() == (root / ASSETS).resolve():
        raise RecipeError(
            f"{output} is where the run keeps its tokenizer, which every export copies; name another folder, such as "
            f"{root / 'export'}"
        )
    model, stored_precision = read_model_file(root, adapters=True)
    config = config_json(model, precision or stored_precision, root / ASSETS)
    frozen = read_lora_file(root)
    weights: Weights = (
        StoredParameters(folder, model)
        if frozen is None
        else Merged(folder, frozen, model, _DTYPES[stored_precision])
    )
    tensors = _Tensors(parameters(model), weights, precision)
    files = plan_files(tensors.sizes, max_shard_size)

    rank, ranks = 0, 1
    if torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    partial = partial_of(output)

    def write_weights() -> None:
        for name in list(files)[rank::ranks]:
            now(f"writing {name} ({len(files)} files in all)")
            write_file(partial / name, files[name], tensors.read(files[name]))

    def finish() -> None:
        if (root / ASSETS).is_dir():
            copy_assets(root / ASSETS, partial)
            rename_tokenizer_class(partial / "tokenizer_config.json")
        _write_json(partial / "config.json", config)
        if not (partial / "generation_config.json").exists():
            _write_json(partial / "generation_config.json", generation_json(config))
        name_end_of_turn(partial)
        _write_json(partial / INDEX, index_of(files))  # also of a single file: readers then need one way only
        publish(output)

    try:
        from_main(lambda: begin(output))
        together(naming(output)(write_weights))
        from_main(naming(output)(finish))
    finally:
        abandon(output)
    return folder


def export_adapters(checkpoint: Path, output: Path) -> Path:
    """Writes a LoRA run's adapters as the folder that PEFT reads; transformers' ``load_adapter`` opens it too.

    It appears whole or not at all, in the place of what may be there. One process.

    Args:
        checkpoint: the run, its checkpoints/, or one of them.
        output: the folder.

    Returns:
        the checkpoint's own folder.

    Raises:
        RecipeError, CheckpointError: it is no LoRA run, or cannot be read.
    """
    root, folder = find_root(checkpoint), resolve(checkpoint)
    frozen = read_lora_file(root)
    if frozen is None:
        raise RecipeError(f"{root} is not a LoRA run: it holds whole weights; leave --adapter out")
    model, _ = read_model_file(root, adapters=True)
    order = lora_parameters(model, frozen.lora)
    tensors = _Tensors(order, StoredParameters(folder, model, order), None)
    try:
        with naming(output):
            partial = begin(output)
            write_file(partial / PEFT_WEIGHTS, tensors.sizes, tensors.read(tensors.sizes))
            _write_json(partial / PEFT_CONFIG, peft_config(frozen.lora, frozen.base))
            publish(output)
    finally:
        abandon(output)
    return folder


class _Tensors:
    """The Hugging Face tensors of a stored model: their sizes, and the tensors one after the other."""

    def __init__(self, order: list[Parameter], stored: Weights, precision: str | None) -> None:
        self.stored = stored
        self.sizes: list[TensorSize] = []
        self._parts: dict[str, tuple[Parameter, int]] = {}
        for parameter in order:
            dtype = _DTYPES[precision] if precision else stored.dtype(parameter)
            for position, part in enumerate(parameter.parts):
                self.sizes.append(TensorSize(part.name, part.shape, dtype))
                self._parts[part.name] = parameter, position

    def read(self, sizes: list[TensorSize]) -> Iterator[Tensor]:
        """These tensors, in this order; a parameter whose tensors follow each other is read once."""
        held: Parameter | None = None
        views: list[Tensor] = []
        for size in sizes:
            parameter, position = self._parts[size.name]
            if parameter is not held:
                views = []  # lets go of the last one first
                held, views = parameter, self.stored.parts(parameter)
            yield views[position]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
