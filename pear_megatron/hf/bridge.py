"""Architectures without a mapping here, through Megatron-Bridge where it is installed, in one process.

Run with Bridge 0.6.2's own code on CPU, with Megatron's layers in the place of Transformer Engine's; not on a GPU
(tests/adapters/test_bridge_cli.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from pear_megatron.errors import CheckpointError, PearError, RecipeError
from pear_megatron.hf.assets import RUN_CONFIG
from pear_megatron.ranks import ensure_ranks
from pear_megatron.recipe.hf_config import read_config
from pear_megatron.storage import abandon, begin, publish, read_settings


def convert_with_bridge(folder: Path, output: Path, reason: RecipeError) -> None:
    """A checkpoint in Megatron-Bridge's own format, for its own training loop.

    It appears only if it holds the folder's weights. Bridge itself leaves out tensors that it has no place for,
    writes whatever is in memory where one is missing, and casts to config.json's dtype.

    Args:
        folder: the Hugging Face checkpoint.
        output: the checkpoint's folder.
        reason: why it has to be Megatron-Bridge; raised if that is not installed, or knows no better.

    Raises:
        RecipeError, CheckpointError, PearError: Bridge cannot read, convert or write it.
    """
    source = _open(folder, reason)
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    def write(partial: Path) -> None:
        # AutoBridge.import_ckpt's steps, but on gloo as export_ckpt's (it takes NCCL, and one port for a whole
        # machine), without a fusion of gradients for which Megatron's output layer wants Apex, and with a look between.
        with temporary_distributed_context("gloo"):
            provider = source.to_megatron_provider()
            provider.gradient_accumulation_fusion = False
            provider.finalize()
            model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
            _check_weights(source, folder, model)
            source.save_megatron_model(
                model, str(partial), hf_tokenizer_path=str(folder.resolve()), low_memory_save=True
            )

    _whole(output, write, f"convert {folder}")


def export_with_bridge(checkpoint: Path, folder: Path, output: Path) -> None:
    """AutoBridge.export_ckpt: a checkpoint of Megatron-Bridge as a Hugging Face folder.

    Args:
        checkpoint: one checkpoint's own folder, ``.../iter_0000020``.
        folder: the Hugging Face checkpoint that it was converted from.
        output: the new Hugging Face folder.

    Raises:
        RecipeError, PearError: it is none of Megatron-Bridge's, or Bridge cannot write all that the source has.
    """
    if not (checkpoint / RUN_CONFIG).is_file():
        raise RecipeError(
            f"{checkpoint} has no {RUN_CONFIG}, so Megatron-Bridge did not write it; --hf is for Bridge's checkpoints, "
            "those of this package are exported without it"
        )
    if read_settings(checkpoint / RUN_CONFIG).get("peft") is not None:
        raise RecipeError(
            f"{checkpoint} holds LoRA's adapters alone; AutoBridge.export_adapter_ckpt of Megatron-Bridge writes "
            "them as PEFT's folder"
        )
    read_config(folder)
    source = _open(folder, RecipeError(f"{checkpoint} is a checkpoint of Megatron-Bridge, which exports it"))
    _whole(
        output,
        lambda partial: source.export_ckpt(str(checkpoint), str(partial), strict=True),
        f"export {checkpoint}, if it was converted from --hf {folder}",
    )


def refuse_options(**given: bool) -> None:
    """Refuses options that Megatron-Bridge's conversions would ignore.

    Args:
        given: whether the user gave each, with ``_`` for ``-``.
    """
    if names := [f"--{name.replace('_', '-')}" for name, is_given in given.items() if is_given]:
        raise RecipeError(
            f"{', '.join(names)}: Megatron-Bridge converts and exports in one process, weights as they are; "
            f"leave {'it' if len(names) == 1 else 'them'} out"
        )


def _open(folder: Path, reason: RecipeError) -> Any:
    """Bridge's view of a Hugging Face checkpoint; RecipeError where it has none."""
    ensure_ranks(1)
    try:
        from megatron.bridge import AutoBridge
    except (ImportError, OSError) as error:  # OSError: Transformer Engine without a GPU's libraries
        raise RecipeError(f"{reason}; it is not installed here ({error})") from error
    try:
        return AutoBridge.from_hf_pretrained(str(folder.resolve()))
    except Exception as error:  # whose first line says what it is; a guide to writing a mapping follows
        said = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise RecipeError(f"{reason}; Megatron-Bridge refuses it: {said.strip('✗ ')}") from error


def _check_weights(source: Any, folder: Path, model: Any) -> None:
    """Compares what an export of Bridge's model would give with the tensors that it was made from.

    Raises:
        CheckpointError: names the tensors that differ, in either way.
    """
    given = source.hf_pretrained.state
    left, changed = set(given.keys()), []
    for name, tensor in source.export_hf_weights(model, cpu=True, show_progress=False):
        same = name in left and torch.equal(tensor.to(given[name].dtype), given[name])
        left.discard(name)
        if not same:
            changed.append(name)
    if wrong := [*changed, *sorted(left)]:
        raise CheckpointError(
            f"Megatron-Bridge would lose or change {len(wrong)} tensor(s) of {folder}: {', '.join(wrong[:4])}; is "
            "every tensor there, of config.json's dtype and not quantised? AutoBridge.import_ckpt would convert it "
            "with a warning at most"
        )


def _whole(output: Path, write: Callable[[Path], None], what: str) -> None:
    """Has a folder appear whole or not at all; Bridge's errors say what it was to do."""
    partial = begin(output)
    try:
        write(partial)
        publish(output)
    except PearError:
        raise
    except (Exception, CheckpointException) as error:  # torch's is none of the first
        raise PearError(f"Megatron-Bridge could not {what}: {error}") from error
    finally:
        abandon(output)
