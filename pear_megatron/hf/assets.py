"""What makes a checkpoint self-describing: model.yaml and hf/ in its root, so that its source may be gone.

model.yaml   the resolved ModelConfig and the precision of the weights
hf/          config.json, generation_config.json, tokenizer and chat template, where there are any
lora.yaml    of a LoRA run, whose checkpoints hold adapters alone: the settings, and the model they belong to
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from pear_megatron.errors import RecipeError
from pear_megatron.recipe import LoraConfig, ModelConfig
from pear_megatron.recipe.sections import head_size, query_groups
from pear_megatron.schema import describe
from pear_megatron.storage import differing_keys, read_settings, remove, write_atomically

MODEL_FILE = "model.yaml"
LORA_FILE = "lora.yaml"
ASSETS = "hf"
RUN_CONFIG = "run_config.yaml"  # what Megatron-Bridge's checkpoints have instead

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)
_LARGEST_ASSET = 64 * 2**20  # bytes; the largest tokenizer.json known is half of it
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def find_root(path: str | Path) -> Path:
    """The folder with model.yaml that a run, one of its checkpoints or a converted checkpoint has, or RecipeError."""
    path = Path(path).absolute()
    for root in (path, path.parent, path.parent.parent):
        if (root / MODEL_FILE).is_file():
            return root
    if any(path.glob(RUN_CONFIG)) or any(path.glob(f"iter_*/{RUN_CONFIG}")):
        raise RecipeError(
            f"{path} is a checkpoint of Megatron-Bridge, for its own training loop; export it with `pear-megatron "
            f"export --checkpoint {path} --hf SOURCE --output NEW`, SOURCE being the Hugging Face folder that it was "
            "converted from"
        )
    raise RecipeError(
        f"no checkpoint at {path}: neither it nor the two folders above have a {MODEL_FILE}; name a run's "
        "output_dir, one of its checkpoints, or the output of `pear-megatron convert`"
    )


def read_model_file(root: Path, *, adapters: bool = False) -> tuple[ModelConfig, str]:
    """The model of a checkpoint's root, and its precision (``bf16`` or ``fp32``).

    Args:
        root: see ``find_root``.
        adapters: the caller knows what to do with checkpoints that hold LoRA's adapters alone.

    Raises:
        RecipeError: model.yaml cannot be read, or the weights are elsewhere.
    """
    path = root / MODEL_FILE
    if (root / LORA_FILE).is_file() and not adapters:
        raise RecipeError(
            f"{root} is a LoRA run: its checkpoints hold adapters, not a model. Merge them into one with "
            f"`pear-megatron export --checkpoint {root} --output {root}-merged`, and name that folder"
        )
    content = read_settings(path)
    try:
        model = ModelConfig.model_validate(content["model"])
    except (KeyError, ValidationError) as error:
        said = describe(error, "model") if isinstance(error, ValidationError) else "it has no `model`"
        raise RecipeError(f"{path} cannot be read: {said}") from error
    if content.get("precision") not in ("bf16", "fp32"):
        raise RecipeError(
            f"{path} cannot be read: precision is {content.get('precision')!r}, not bf16 or fp32"
        )
    return model, content["precision"]


def write_model_files(
    root: Path,
    model: ModelConfig,
    precision: str,
    *,
    source: Path | None,
    tokenizer: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes hf/ and then model.yaml into a checkpoint's root; each appears whole.

    Args:
        root: the folder; made if need be.
        model: what config.json does not say is in here.
        precision: of the weights, ``bf16`` or ``fp32``.
        source: folder that the small files come from: a Hugging Face checkpoint or another root's hf/.
        tokenizer: name or folder of the tokenizer, where it is not the source's own.
        chat_template: its text, where it is not the tokenizer's own.
    """
    root.mkdir(parents=True, exist_ok=True)
    partial, final = root / f".{ASSETS}.partial", root / ASSETS
    remove(partial)
    if source is not None:
        copy_assets(source, partial)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, partial)
    if chat_template is not None and (partial / "tokenizer.json").is_file():
        _put_chat_template(chat_template, partial)
    if partial.is_dir():
        remove(final)
        os.replace(partial, final)
    content = {"model": model.model_dump(mode="json", exclude={"hf"}), "precision": precision}
    write_atomically(root / MODEL_FILE, yaml.safe_dump(content, sort_keys=False))


def copy_assets(source: Path, target: Path) -> None:
    """Copies what is small and no weights: configurations, tokenizer, chat templates, licence.

    Left out are the model card, which describes the source's weights, and hidden files.
    """
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not file.is_file() or name.name == "README.md" or name.name.endswith(_WEIGHTS):
            continue
        if len(name.parts) > 2 or file.stat().st_size > _LARGEST_ASSET:
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def _save_tokenizer(tokenizer: str, target: Path) -> None:
    """Puts a tokenizer in place of the one that may be there; a folder's files as they are."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        (target / name).unlink(missing_ok=True)
    if (Path(tokenizer) / "tokenizer.json").is_file():
        for name in _TOKENIZER_FILES:
            if (Path(tokenizer) / name).is_file():
                shutil.copyfile(Path(tokenizer) / name, target / name)
        return
    from pear_megatron.data.tokenizer import load_tokenizer

    load_tokenizer(tokenizer).save_pretrained(target)


def _put_chat_template(text: str, folder: Path) -> None:
    """Makes it the one that the tokenizer has, wherever it kept another."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if config.is_file():
        kept = json.loads(config.read_text(encoding="utf-8"))
        if kept.pop("chat_template", None) is not None:
            config.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class LoraBase:
    """The frozen model of a LoRA run, and the adapters' settings.

    Attributes:
        base: folder of the Hugging Face or Megatron-Core checkpoint.
        digest: of its weights, as ``read_model_facts`` gives it.
    """

    base: str
    digest: str
    lora: LoraConfig


def read_lora_file(root: Path) -> LoraBase | None:
    """What lora.yaml says; None where the checkpoints hold whole models."""
    path = root / LORA_FILE
    if not path.is_file():
        return None
    content = read_settings(path)
    try:
        lora = LoraConfig.model_validate(content["lora"])
        return LoraBase(str(content["base"]), str(content["digest"]), lora)
    except (KeyError, ValidationError) as error:
        said = describe(error, "lora") if isinstance(error, ValidationError) else f"it has no {error}"
        raise RecipeError(f"{path} cannot be read: {said}") from error


def write_lora_file(root: Path, frozen: LoraBase) -> None:
    """Writes lora.yaml; RecipeError if the one that is there names other weights."""
    before = read_lora_file(root)
    if before is not None and before.digest != frozen.digest:
        raise RecipeError(
            f"the adapters in {root} were trained beside other weights than {frozen.base} holds now; put the weights "
            "that the run began with back, or choose another output_dir"
        )
    root.mkdir(parents=True, exist_ok=True)
    content = {"base": frozen.base, "digest": frozen.digest, "lora": frozen.lora.model_dump(mode="json")}
    write_atomically(root / LORA_FILE, yaml.safe_dump(content, sort_keys=False))


def check_same_model(root: Path, model: ModelConfig) -> None:
    """Refuses a checkpoint of another model than the recipe's.

    What only shapes fresh weights may differ.

    Raises:
        RecipeError: names the keys that differ.
    """
    old, new = _comparable(read_model_file(root)[0]), _comparable(model)
    if keys := differing_keys(old, new):
        shown = ", ".join(f"model.{key} {new[key]!r} (there {old[key]!r})" for key in keys)
        raise RecipeError(f"the checkpoint {root} holds another model than the recipe: {shown}")


def _comparable(model: ModelConfig) -> dict[str, object]:
    """The model's keys with its defaults spelt out, without those that only shape fresh weights."""
    fresh = {"hf", "init_method_std", "embedding_init_method_std"}
    values = model.model_dump(mode="json", exclude=fresh)
    return values | {"kv_channels": head_size(model), "num_query_groups": query_groups(model)}
