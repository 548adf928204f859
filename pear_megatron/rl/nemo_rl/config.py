"""Composing a NeMo-RL recipe with a checkout's own loader; what is no key of NeMo-RL's is refused."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from pear_megatron.errors import RecipeError
from pear_megatron.recipe.shipped import NEMO_RL, PREFIX, find_shipped

HOW_TO_GET = (
    "git clone --recursive https://github.com/NVIDIA-NeMo/RL (these recipes were checked with its commit "
    "7ea279ab), then export NEMO_RL_DIR=that folder"
)
_CONFIGS = Path("examples/configs")
_LOADER = Path("nemo_rl/utils/config.py")
# Mappings that NeMo-RL hands on to another library, whose keys are that library's.
_OPEN = ("env.nemo_gym", "logger.wandb", "policy.generation.vllm_kwargs", "policy.hf_config_overrides")
# Keys that NeMo-RL's types have and none of its files shows.
_TYPED = tuple(f"checkpointing.pretrained_checkpoint{key}" for key in ("", ".path", ".format"))
_DATA_SETS = ("data.train", "data.validation", "data.default")  # the three take the same keys


@dataclass(frozen=True)
class Composed:
    """A recipe with its parents and overrides applied.

    Attributes:
        values: the whole configuration, interpolations resolved.
        base: the same for the files of NeMo-RL that the recipe inherits from.
    """

    values: dict[str, Any]
    base: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key; ``default`` where it or a mapping above it is missing or null."""
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, dict) or value.get(part) is None:
                return default
            value = value[part]
        return value

    def differences(self) -> list[tuple[str, Any, Any]]:
        """(key, NeMo-RL's value, the recipe's value) where the two differ; None stands for no value."""
        old, new = dict(_leaves(self.base)), dict(_leaves(self.values))
        return [
            (key, old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)
        ]


def find_checkout() -> Path:
    """The NeMo-RL checkout that the environment variable NEMO_RL_DIR names.

    Raises:
        RecipeError: it is not set, or names no checkout.
    """
    named = os.environ.get("NEMO_RL_DIR")
    if not named:
        raise RecipeError(f"NEMO_RL_DIR is not set; GRPO runs in a checkout of NeMo-RL: {HOW_TO_GET}")
    root = Path(named).resolve()
    for file in (_LOADER, "examples/run_grpo.py", _CONFIGS / "grpo_math_1B_megatron.yaml"):
        if not (root / file).is_file():
            raise RecipeError(
                f"NEMO_RL_DIR={named} is no checkout of NeMo-RL: it has no {file}; {HOW_TO_GET}"
            )
    return root


def compose(root: Path, recipe: Path, overrides: list[str]) -> Composed:
    """Loads a recipe as NeMo-RL does, with its own code, and refuses keys that it would silently ignore.

    Args:
        root: the checkout.
        recipe: the YAML file, whose ``defaults`` lead to a file of the checkout.
        overrides: Hydra's ``key=value``; a key that NeMo-RL's files do not show is written ``+key=value``.

    Raises:
        RecipeError: a file that cannot be loaded, an unknown key (with the nearest known one), a bad override.
    """
    if not recipe.is_file():
        raise RecipeError(f"no recipe at {recipe}")
    loader = _loader(root)
    try:
        parents, own = _chain(root, recipe.resolve())
        if not parents:
            raise RecipeError(
                f"{recipe} inherits from no file of NeMo-RL; give it "
                "`defaults: ${oc.env:NEMO_RL_DIR}/examples/configs/grpo_math_8B_megatron.yaml` or another one"
            )
        base: Any = OmegaConf.create({})
        for parent in parents:
            base = loader.merge_with_override(base, loader.load_config(parent))
        config = loader.load_config(recipe)
        _check_own_keys(root, recipe, base, own)
        _check_overrides(config, overrides)
        config = loader.parse_hydra_overrides(config, overrides)
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        resolved_base = OmegaConf.to_container(base, resolve=True)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{recipe} cannot be loaded by NeMo-RL: {type(error).__name__}: {error}") from error
    return Composed(values, resolved_base)  # type: ignore[arg-type]


def _loader(root: Path) -> ModuleType:
    """NeMo-RL's own loader: a file that needs omegaconf and Hydra alone, so importing it starts nothing."""
    spec = importlib.util.spec_from_file_location("pear_megatron_nemo_rl_loader", root / _LOADER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register_omegaconf_resolvers()
    return module


def _chain(root: Path, path: Path) -> tuple[list[Path], list[DictConfig]]:
    """The files of NeMo-RL that a recipe leads to, and the recipe's own files on the way, unmerged."""
    if path.is_relative_to(root):
        return [path], []
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise RecipeError(f"{path}: a recipe is a mapping of keys")
    defaults = config.pop("defaults", None) or []
    parents: list[Path] = []
    own: list[DictConfig] = []
    for parent in [defaults] if isinstance(defaults, str) else list(defaults):
        if str(parent).startswith(PREFIX):
            name = find_shipped(str(parent), NEMO_RL).name
            raise RecipeError(
                f"{path}: defaults: NeMo-RL reads this file itself and knows no {parent}; put that recipe beside it "
                f"with `pear-megatron recipes copy {NEMO_RL}/{name} {path.parent}`, and write `defaults: {name}`"
            )
        more_parents, more_own = _chain(root, (path.parent / str(parent)).resolve())
        parents += more_parents
        own += more_own
    return parents, [*own, config]


def _check_own_keys(root: Path, recipe: Path, base: DictConfig, own: list[DictConfig]) -> None:
    known = set(_keys(OmegaConf.to_container(base)))
    used = {key for config in own for key in _keys(OmegaConf.to_container(config))}
    if unknown := sorted(key for key in used if not _is_known(key, known, base)):
        known |= _shipped_keys(root)  # reading a few hundred files, so only where it is needed
        for key in unknown:
            if not _is_known(key, known, base):
                raise RecipeError(
                    f"{recipe}: NeMo-RL has no key {key}, and would ignore it{_nearest(key, known)}; if it is "
                    f"right, leave it out of the file and give it on the command line, as +{key}=value"
                )


def _is_known(key: str, known: set[str], base: DictConfig) -> bool:
    if key.endswith("_override_"):  # NeMo-RL's mark: this section replaces the parents'
        return key.count(".") == 1
    if key in known or any(key.startswith(f"{prefix}.") for prefix in _OPEN):
        return True
    for name in _DATA_SETS:
        if key.startswith(f"{name}.") and known & {key.replace(name, other, 1) for other in _DATA_SETS}:
            return True
    above = key.rpartition(".")[0]  # a mapping that is empty or null there takes any key
    return (
        bool(above) and above in known and not OmegaConf.select(base, above) and not above.startswith("data.")
    )


def _check_overrides(config: DictConfig, overrides: list[str]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    known = set(_keys(OmegaConf.to_container(config)))
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise RecipeError(f"override {text!r}: {error}") from error
        key = override.key_or_group
        named = ".".join(part for part in key.split(".") if not part.isdigit())  # data.validation.0.repeat
        if named not in known and not (override.is_add() or override.is_force_add()):
            raise RecipeError(
                f"override {text!r}: the recipe and NeMo-RL's files have no key {key}{_nearest(key, known)}; "
                f"if NeMo-RL reads it all the same, write +{text}"
            )


def _nearest(key: str, known: set[str]) -> str:
    """The known key that was probably meant: the same name elsewhere, or a similar one."""
    name = key.rpartition(".")[2]
    same = [other for other in known if other.rpartition(".")[2] == name]
    near = difflib.get_close_matches(key, same or sorted(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _shipped_keys(root: Path) -> set[str]:
    """The keys of every file that NeMo-RL ships for GRPO."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    keys = set(_TYPED)
    for path in [*(root / _CONFIGS).rglob("*.yaml"), *(root / "examples/nemo_gym").rglob("*.yaml")]:
        content = yaml.load(path.read_text(encoding="utf-8"), loader)
        if isinstance(content, dict) and "sft" not in content and "dpo" not in content:
            keys |= set(_keys(content))
    return keys


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested mappings; a list is transparent, as data.train may be one or a list of data sets."""
    for item in value if isinstance(value, list) else [value]:
        for key, below in item.items() if isinstance(item, dict) else ():
            yield f"{prefix}{key}"
            yield from _keys(below, f"{prefix}{key}.")


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, below in value.items():
        if isinstance(below, dict) and below:
            yield from _leaves(below, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", below
