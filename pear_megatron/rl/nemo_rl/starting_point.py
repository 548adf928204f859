"""The checkpoint that GRPO starts from: a Hugging Face folder or one of ours, and whether a recipe can take it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pear_megatron.errors import RecipeError
from pear_megatron.recipe.hf_config import read_config
from pear_megatron.rl.nemo_rl.config import Composed
from pear_megatron.rl.nemo_rl.rules import Layout, size_of

_INDEX = "model.safetensors.index.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class StartingPoint:
    """Where the architecture and the weights come from.

    Attributes:
        hf: folder with config.json and the tokenizer.
        megatron: folder of the torch_dist checkpoint that has the weights; None = they are in ``hf``.
    """

    hf: Path
    megatron: Path | None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, of the text model where there are several."""
        config = read_config(self.hf)
        return config.get("text_config") or config

    def files(self) -> Iterator[Path]:
        """The folders and files that the weights, the architecture and the tokenizer are read from."""
        for folder in (self.hf, self.megatron):
            if folder is not None:
                yield folder
                yield from (path for path in folder.iterdir() if path.is_file())


def read_starting_point(path: str | Path) -> StartingPoint:
    """What ``--checkpoint`` names: a Hugging Face folder, a run, its checkpoints, or one of them.

    Raises:
        RecipeError, CheckpointError: it is none of these, is not whole, or cannot start GRPO.
    """
    folder = Path(os.path.abspath(Path(path).expanduser()))  # as given: NeMo-RL's cache goes by the name
    if not folder.is_dir():
        raise RecipeError(f"no checkpoint at {path}: no such folder")
    if (folder / "config.json").is_file():
        start = StartingPoint(folder, None)
        _check_weights(folder)
    else:
        start = _megatron(folder)
    for key in ("architectures", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not (start.config.get(key) or (key == "architectures" and read_config(start.hf).get(key))):
            raise RecipeError(f"{start.hf / 'config.json'} has no {key}; is the file whole?")
    return start


def _megatron(folder: Path) -> StartingPoint:
    from pear_megatron.hf.assets import ASSETS, check_same_model, find_root
    from pear_megatron.megatron.checkpoint.paths import resolve
    from pear_megatron.megatron.checkpoint.restricted import read_common
    from pear_megatron.recipe.hf_config import model_config

    root = find_root(folder)
    if not (root / ASSETS / "config.json").is_file():
        raise RecipeError(
            f"{root} has no {ASSETS}/config.json, which NeMo-RL takes the architecture and the tokenizer from; "
            "`pear-megatron export` it and start from the export"
        )
    check_same_model(root, model_config(root / ASSETS))
    megatron = resolve(folder)
    if "args" not in read_common(megatron):  # Megatron-Bridge insists on it
        raise RecipeError(
            f"{megatron} lacks what NeMo-RL reads; `pear-megatron export` it and start from the export"
        )
    return StartingPoint(root / ASSETS, megatron)


def _check_weights(folder: Path) -> None:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = {
                str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            }
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise RecipeError(f"{index} cannot be read: {error}; copy the checkpoint again") from error
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            raise RecipeError(
                f"{folder} is not whole: {len(missing)} of {len(names)} weight files are missing ({missing[0]}, "
                "...); copy it again"
            )
    elif not list(folder.glob("*.safetensors")):
        raise RecipeError(f"{folder} has a config.json and no .safetensors files; name a whole checkpoint")


def fit_faults(start: StartingPoint, recipe: Composed, sizes: Layout) -> list[str]:
    """Every reason why this recipe cannot run from this checkpoint; empty if none is known.

    Args:
        start: the checkpoint.
        recipe: composed, with policy.model_name already the checkpoint's.
        sizes: its layout.
    """
    return _layout_faults(start, recipe, sizes) + _length_faults(start, recipe) + _tokenizer_faults(
        start, recipe
    )  # fmt: skip


def _layout_faults(start: StartingPoint, recipe: Composed, sizes: Layout) -> list[str]:
    config, found = start.config, []
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    megatron = "policy.megatron_cfg"
    uneven = [recipe.get(f"{megatron}.num_layers_in_{end}_pipeline_stage") for end in ("first", "last")]
    rest = layers - sum(n for n in uneven if n)
    stages = sizes.pipeline - sum(1 for n in uneven if n)
    if sizes.pipeline > 1 and (rest % stages if stages else rest):
        found.append(
            f"{megatron}.pipeline_model_parallel_size {sizes.pipeline} does not divide the model's {layers} layers"
        )
    for key, size in (
        (f"{megatron}.tensor_model_parallel_size", sizes.tensor),
        ("policy.generation.vllm_cfg.tensor_parallel_size", sizes.vllm_tensor),
    ):
        if heads % size:
            found.append(f"{key} {size} does not divide the model's {heads} attention heads")
        if groups % size and size % groups:
            found.append(f"{key} {size} and the model's {groups} key/value heads do not divide one another")
    return found


def _length_faults(start: StartingPoint, recipe: Composed) -> list[str]:
    longest = size_of(recipe, "policy.max_total_sequence_length")
    limit = start.config.get("max_position_embeddings")
    if limit and longest > limit and not recipe.get("policy.hf_config_overrides"):
        return [
            f"policy.max_total_sequence_length {longest} exceeds the model's context of {limit} "
            f"(max_position_embeddings in {start.hf / 'config.json'})"
        ]
    return []


def _tokenizer_faults(start: StartingPoint, recipe: Composed) -> list[str]:
    name = recipe.get("policy.tokenizer.name")
    folder = Path(str(name))
    if not folder.is_dir():
        return [
            f"policy.tokenizer.name {name} is not a folder; leave it out: the checkpoint's own tokenizer is the one "
            "that the model was trained with"
        ]
    found = []
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        return [
            f"{folder} has no tokenizer.json; copy the tokenizer of the model that SFT started from there"
        ]
    largest = _largest_token_id(folder)
    if largest is not None and largest >= start.config["vocab_size"]:
        found.append(
            f"{folder} has a tokenizer with ids up to {largest}, and the model has {start.config['vocab_size']} "
            "embeddings; it is another model's tokenizer"
        )
    if "chat_template" not in (recipe.get("policy.tokenizer") or {}) and not _has_chat_template(folder):
        found.append(
            f"{folder} has no chat template, which the prompts are written with; put chat_template.jinja there, or "
            "give +policy.tokenizer.chat_template=FILE.jinja (null = the bare prompt)"
        )
    return found


def _largest_token_id(folder: Path) -> int | None:
    """Of tokenizer.json; None where there is none, or its model has no list of tokens."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        return max([*ids, *(token["id"] for token in content.get("added_tokens", []))])
    except (OSError, ValueError, KeyError):
        return None


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _TEMPLATES):
        return True
    try:
        return bool(
            json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        )
    except (OSError, ValueError):
        return False


def stop_token_ids(tokenizer_folder: str) -> list[int] | None:
    """The tokens that end an answer, where the tokenizer's EOS alone does not; None where it does.

    NeMo-RL stops at the tokenizer's EOS (see ``end_of_turn``).

    Raises:
        ImportError: transformers is missing. DataError: the tokenizer cannot be loaded.
        RowProblem: see ``end_of_turn``.
    """
    from pear_megatron.data.chat.ends import end_of_turn
    from pear_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    end, eos = end_of_turn(tokenizer), tokenizer.eos_token_id
    return None if end is None or end == eos else [*([] if eos is None else [eos]), end]
