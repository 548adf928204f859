"""Architectures without a mapping here, through Megatron-Bridge where it is installed. Not tested: it needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pear_megatron.errors import PearError, RecipeError
from pear_megatron.storage import abandon, begin, publish


def convert_with_bridge(folder: Path, output: Path, reason: RecipeError) -> None:
    """AutoBridge.import_ckpt: a checkpoint in Megatron-Bridge's own format, for its own training loop.

    Args:
        folder: the Hugging Face checkpoint.
        output: the checkpoint's folder.
        reason: why it has to be Megatron-Bridge; raised if that is not installed.
    """
    bridge = _auto_bridge(reason)
    _whole(output, lambda partial: bridge.import_ckpt(str(folder), str(partial)))


def export_with_bridge(checkpoint: Path, folder: Path, output: Path) -> None:
    """AutoBridge.export_ckpt: a checkpoint of Megatron-Bridge as a Hugging Face folder.

    Args:
        checkpoint: the checkpoint's folder.
        folder: the Hugging Face checkpoint that it was converted from.
        output: the new Hugging Face folder.
    """
    bridge = _auto_bridge(
        RecipeError(
            "--hf is for checkpoints of Megatron-Bridge; those of this package are exported without it"
        )
    )
    source = bridge.from_hf_pretrained(str(folder))
    _whole(output, lambda partial: source.export_ckpt(str(checkpoint), str(partial)))


def _auto_bridge(reason: RecipeError) -> Any:
    try:
        from megatron.bridge import AutoBridge
    except ImportError as error:
        raise RecipeError(f"{reason}; it is not installed here ({error})") from error
    return AutoBridge


def _whole(output: Path, write: Any) -> None:
    try:
        write(begin(output))
        publish(output)
    except Exception as error:
        raise PearError(f"Megatron-Bridge could not write {output}: {error}") from error
    finally:
        abandon(output)
