"""How recipe files, their parents and the command line's overrides become one Recipe."""

from __future__ import annotations

import difflib
import logging
import os
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from pear_megatron.errors import RecipeError
from pear_megatron.recipe.sections import Recipe
from pear_megatron.recipe.shipped import PREFIX, recipe_file, shipped_recipes
from pear_megatron.schema import describe

log = logging.getLogger("pear_megatron")

_Kind = TypeVar("_Kind", bound=BaseModel)


def _load_with_defaults(
    path: Path, paths: tuple[str, ...] = (), folder: str | None = None, seen: tuple[Path, ...] = ()
) -> DictConfig:
    """The YAML at ``path`` over what its ``defaults:`` names: paths relative to the file, or ``pear:NAME``.

    ``paths`` are dotted keys whose values are paths relative to the file that gives them.
    """
    if path in seen:
        raise RecipeError(
            f"{path}: `defaults` goes round in a circle: {' -> '.join(map(str, [*seen, path]))}"
        )
    if not path.is_file():
        raise RecipeError(_no_recipe(path, seen))
    try:
        config = OmegaConf.load(path)
    except Exception as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, found {type(config).__name__}")
    try:
        for key in paths:
            if isinstance(value := OmegaConf.select(config, key), str):
                OmegaConf.update(config, key, str(_named(path, key, value)))
        given = config.pop("defaults", None) or []
        parents = [given] if isinstance(given, str) else given
        if not isinstance(parents, list | ListConfig) or not all(
            isinstance(parent, str) for parent in parents
        ):
            raise RecipeError(f"{path}: defaults: the path of a recipe, or a list of them (got {given!r})")
        merged: Any = OmegaConf.create({})
        for parent in parents:
            file = _named(path, "defaults", parent, folder)
            merged = _merge(path, merged, _load_with_defaults(file, paths, folder, (*seen, path)))
        return _merge(path, merged, config)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {error}") from error


def _merge(path: Path, under: Any, over: Any) -> Any:
    """``over`` over ``under``; RecipeError, with the key, where a list would meet a mapping."""
    if clash := _clash(under, over):
        raise RecipeError(f"{path}: {clash} in what it inherits from; write it in the same form")
    return OmegaConf.merge(under, over)


def _clash(under: Any, over: Any, key: str = "") -> str | None:
    names: dict[type, str] = {DictConfig: "a mapping", ListConfig: "a list"}
    if type(under) in names and type(over) in names and type(under) is not type(over):
        return f"{key}: {names[type(over)]} here and {names[type(under)]}"
    if not isinstance(under, DictConfig) or not isinstance(over, DictConfig):
        return None
    found = (
        _clash(under._get_node(name), over._get_node(name), f"{key}.{name!s}" if key else str(name))
        for name in over
        if name in under
    )
    return next(filter(None, found), None)


def _named(path: Path, key: str, value: str, folder: str | None = None) -> Path:
    """The recipe that ``key`` of the file at ``path`` names."""
    try:
        return recipe_file(value, folder, base=path.parent)
    except RecipeError as error:
        raise RecipeError(f"{path}: {key}: {error}") from error


def _no_recipe(path: Path, seen: tuple[Path, ...]) -> str:
    """What to say of a file that is not there, with those that may be meant."""
    here = seen[-1].parent if seen else Path.cwd()
    beside = {file.name: file for file in path.parent.glob("*.y*ml") if file not in seen}
    found = sorted(Path.cwd().glob(f"recipes/*/{path.name}"))
    found += [beside[name] for name in difflib.get_close_matches(path.name, sorted(beside), n=1)]
    near = [os.path.relpath(file, here) for file in found]
    if not found:
        shipped = [name for name in shipped_recipes() if name.endswith(f"/{path.name}")]
        same_folder = [name for name in shipped if name == f"{path.parent.name}/{path.name}"]
        near += [f"{PREFIX}{name}" for name in same_folder or shipped]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else ""
    if not seen:
        return f"no recipe at {path}{hint}"
    return (
        f"no recipe at {path} (named by `defaults` of {seen[-1]}); `defaults` holds paths relative to that file's "
        f"folder{hint or '; copy the file there, or write the path to it'}"
    )


def _apply_overrides(config: DictConfig, overrides: list[str]) -> DictConfig:
    """Hydra's override grammar: ``key=value``, ``+key=value``, ``~key``."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException, OverrideParseException

    parser = OverridesParser.create()
    OmegaConf.set_struct(config, False)  # unknown keys are named by validation, with a suggestion
    for text in overrides:
        key, _, value = text.partition("=")
        if value.startswith("~/"):  # an operator of the grammar
            text = f"{key}={os.path.expanduser(value)}"
        try:
            (override,) = parser.parse_overrides(overrides=[text])
            if override.is_sweep_override():
                raise RecipeError(f"override {text}: a list is written in brackets, key=[a,b]")
            ConfigLoaderImpl._apply_overrides_to_config([override], config)
        except OverrideParseException as error:
            said = str(error).partition("\n")[0].removeprefix("LexerNoViableAltException: ")
            raise RecipeError(
                f"override {text}: {said}; write key=value, a list as key=[a,b], and quote a value with other signs in "
                "it, for the shell and once more: 'key=\"a=b\"'"
            ) from error
        except (HydraException, OmegaConfBaseException) as error:
            raise RecipeError(f"override {text}: {error}") from error
    return config


def load_recipe(
    path: str | Path, overrides: list[str] | None = None, *, missing: dict[str, Any] | None = None
) -> Recipe:
    """Reads a recipe, its parents and the command line's overrides into one validated object.

    Args:
        path: the YAML file, or ``pear:NAME`` for one that comes with the package; ``defaults:`` in it names
            files it inherits from in the same way.
        overrides: Hydra-style ``key=value`` strings; they win.
        missing: values of keys that neither the files nor the overrides give.

    Raises:
        RecipeError: a missing file, bad YAML, an unknown key (with the nearest known one) or a bad value.
    """
    path = Path(path)
    values = read_values(path, overrides, missing=missing, folder="sft")
    _complete_model(path, values)
    return validate_as(Recipe, path, values)


def read_values(
    path: Path,
    overrides: list[str] | None = None,
    *,
    missing: dict[str, Any] | None = None,
    paths: tuple[str, ...] = (),
    folder: str | None = None,
) -> Any:
    """The resolved values of a YAML file, its parents and overrides, for any kind of file; not validated.

    Args:
        path, overrides, missing: see ``load_recipe``.
        paths: dotted keys of paths that are relative to the file that gives them, and absolute here.
        folder: of recipes/, in which ``pear:NAME`` is looked for first.
    """
    config = _apply_overrides(
        _load_with_defaults(recipe_file(path, folder), paths, folder), list(overrides or [])
    )
    try:
        return _at_home(
            OmegaConf.to_container(
                OmegaConf.merge(missing or {}, config), resolve=True, throw_on_missing=True
            )
        )
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise RecipeError(f"{path}: {key}{str(error).partition(chr(10))[0]}") from error


def _at_home(value: Any) -> Any:
    """Values that begin with ``~/`` as paths in the user's home, wherever they stand."""
    if isinstance(value, dict):
        return {key: _at_home(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_at_home(entry) for entry in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def validate_as(kind: type[_Kind], path: Path, values: Any) -> _Kind:
    """``values`` as an object of that kind; RecipeError on an unknown key, with the nearest known one, or bad value."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe(error, root=kind)}") from error


def _complete_model(path: Path, values: Any) -> None:
    """Fills ``model:`` from the config.json of ``model.hf``; what the recipe gives must agree with it.

    Its tokenizer becomes data.tokenizer, unless the recipe gives that key.
    """
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("hf"), str):
        return
    from pear_megatron.recipe.hf_config import has_tokenizer, model_keys

    found = model_keys(model["hf"])
    data = values.get("data")
    if isinstance(data, dict) and has_tokenizer(model["hf"]):
        data.setdefault("tokenizer", model["hf"])
    elif isinstance(data, dict) and data.get("tokenizer") is None:
        log.info(
            "model.hf %s has no tokenizer.json: rows of text need data.tokenizer, and so does what is exported",
            model["hf"],
        )
    for key, value in found.items():
        if model.setdefault(key, value) != value:
            raise RecipeError(
                f"{path}: model.{key} is {model[key]!r}, but model.hf {model['hf']} has {value!r}; "
                "correct it, leave it out, or name another model.hf"
            )


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, as a run writes it to ``output_dir/config.yaml``."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))
