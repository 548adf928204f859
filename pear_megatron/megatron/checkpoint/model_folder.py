"""ModelFacts: what scoring must know of a model before it is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_megatron.errors import EvalError, RecipeError, ScoreError
from pear_megatron.megatron.checkpoint.paths import resolve

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".distcp", ".pt")
_SAMPLE = 65536  # bytes read from the head of a file of weights
_PIECE, _PLACES = 1 << 12, 256  # bytes of a piece of a file, and pieces where its tensors are not known


@dataclass(frozen=True)
class ModelFacts:
    """A model as its folder describes it.

    Attributes:
        vocab_size, max_length: from its configuration; None where there is none to read (.gguf).
        tokenizer: folder of its tokenizer, or None.
        digest: 16 hex characters over the configuration and samples of the weights: the same for a copy of
            the model elsewhere, another one for other weights.
    """

    vocab_size: int | None
    max_length: int | None
    tokenizer: str | None
    digest: str


def read_model_facts(folder: str | Path) -> ModelFacts:
    """The facts of a Hugging Face folder, a folder with a .gguf file, or a Megatron-Core checkpoint.

    Raises:
        ScoreError, RecipeError, CheckpointError: there is no such model, or its configuration is broken.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() or not is_megatron_checkpoint(folder):
        config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        config = config.get("text_config") or config
        files = [file for file in sorted(folder.iterdir()) if file.name.endswith(_WEIGHTS)]
        return ModelFacts(
            config.get("vocab_size"),
            config.get("max_position_embeddings"),
            _tokenizer(folder),
            _digest(json.dumps(config, sort_keys=True), files),
        )
    from pear_megatron.hf.assets import ASSETS, find_root, read_model_file

    root = find_root(folder)
    model, _ = read_model_file(root)
    files = [file for file in sorted(resolve(folder).rglob("*")) if file.name.endswith(_WEIGHTS)]
    described = json.dumps(model.model_dump(mode="json", exclude={"hf"}), sort_keys=True)
    return ModelFacts(
        model.vocab_size, model.max_position_embeddings, _tokenizer(root / ASSETS), _digest(described, files)
    )


def check_split(folder: str | Path, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Refuses sizes that a model for Megatron-Core cannot be split into, before any rank is started.

    Raises:
        RecipeError: names the model's size and the ranks'.
    """
    from pear_megatron.hf.assets import find_root, read_model_file
    from pear_megatron.recipe import ParallelConfig, TrainConfig, check_layout
    from pear_megatron.recipe.hf_config import model_config

    if (Path(folder) / "config.json").is_file():
        model = model_config(folder)
    else:
        model, _ = read_model_file(find_root(folder))
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor_parallel, pipeline_model_parallel_size=pipeline_parallel
    )
    check_layout(model, parallel, TrainConfig(global_batch_size=1), tensor_parallel * pipeline_parallel)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScoreError(f"{path} cannot be read: {error}; is the file whole?") from error


def _tokenizer(folder: Path) -> str | None:
    found = (
        any((folder / name).is_file() for name in _TOKENIZER_FILES) or len(list(folder.glob("*.gguf"))) == 1
    )
    return str(folder) if found else None


def _digest(described: str, files: list[Path]) -> str:
    """Over a description, and the name, the size and samples of each file: its head, and a piece of every tensor."""
    digest = hashlib.sha256(described.encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            for start in _middles(path, size):
                file.seek(start)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]


def _middles(path: Path, size: int) -> list[int]:
    """Where pieces of a file are read: the middle of every tensor of a safetensors file, else places evenly spread."""
    if path.suffix == ".safetensors":
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length < size else {}
            ends = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
            return [8 + length + (start + end) // 2 for start, end in ends]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # whoever loads it says that it is damaged
    return [size * i // _PLACES for i in range(_PLACES)]


def is_megatron_checkpoint(folder: Path) -> bool:
    """Whether a folder is a run of ours, one of its checkpoints, or the output of ``convert``."""
    from pear_megatron.hf.assets import find_root

    try:
        find_root(folder)
    except RecipeError:
        return False
    return True


_MEGATRON_FILES = ("latest_checkpointed_iteration.txt", "metadata.json")


def check_model_folder(model: str | Path) -> Path:
    """The folder of a Hugging Face checkpoint with its tokenizer.

    Raises:
        EvalError: there is no such folder, or it holds a Megatron checkpoint, or no model, or no tokenizer.
    """
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        if _tokenizer(folder) is None:
            raise EvalError(
                f"{folder} holds a model and no tokenizer; copy tokenizer.json and tokenizer_config.json of the model "
                "that it was made from into it"
            )
        return folder
    if not folder.is_dir():
        raise EvalError(
            f"no model at {folder}: no such folder; name an export or another Hugging Face folder"
        )
    if is_megatron_checkpoint(folder) or any((folder / name).is_file() for name in _MEGATRON_FILES):
        raise EvalError(
            f"{folder} is a Megatron checkpoint; export it first: "
            f"pear-megatron export --checkpoint {folder} --output {folder}-hf"
        )
    raise EvalError(f"{folder} has no config.json: it is no Hugging Face checkpoint")
