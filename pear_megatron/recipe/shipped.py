"""The recipes and Slurm scripts that come with the package: found, listed, copied; ``pear:NAME`` in a recipe."""

from __future__ import annotations

import difflib
import re
import shutil
import sys
from pathlib import Path

import pear_megatron
from pear_megatron.errors import RecipeError

PREFIX = "pear:"
NEMO_RL = "grpo"  # the folder of recipes that NeMo-RL reads by itself
_PATHS = re.compile(r"^(\s*(?:defaults|recipe): )([\w./-]+\.yaml)", re.MULTILINE)
_PYTHON = re.compile(r"^# export PEAR_PYTHON=.*$", re.MULTILINE)


def shipped_folder(name: str) -> Path:
    """The folder of ``recipes`` or ``slurm``: inside an installed package, or beside it in a checkout."""
    package = Path(pear_megatron.__file__).parent
    for folder in (package / f"_{name}", package.parent / name):
        if folder.is_dir():
            return folder
    raise RecipeError(f"{package} has no {name}: this installation is not whole; install pear-megatron again")


def shipped_recipes() -> dict[str, Path]:
    """``sft/tiny.yaml`` -> its file, for every recipe that comes with the package."""
    root = shipped_folder("recipes")
    return {path.relative_to(root).as_posix(): path for path in sorted(root.glob("*/*.yaml"))}


def find_shipped(name: str, folder: str | None = None) -> Path:
    """The file of a recipe that comes with the package.

    Args:
        name: ``sft/tiny.yaml``, or ``tiny.yaml`` where that is clear; ``.yaml`` may be left out.
        folder: where a bare name is looked for first: ``sft``, ``grpo``, ``grpo_trl``, ``compare``.

    Raises:
        RecipeError: no recipe of that name (with the closest ones), or several.
    """
    known = shipped_recipes()
    name = name.removeprefix(PREFIX)
    wanted = name if name.endswith(".yaml") else f"{name}.yaml"
    for exact in (wanted, f"{folder}/{wanted}"):
        if exact in known:
            return known[exact]
    found = [other for other in known if other.partition("/")[2] == wanted]
    if len(found) == 1:
        return known[found[0]]
    if found:
        raise RecipeError(f"recipe {name!r} is {_either(found)}; write which")
    stems = difflib.get_close_matches(Path(wanted).stem, {path.stem for path in known.values()}, n=2)
    near = difflib.get_close_matches(wanted, known, n=2) if "/" in wanted else []
    near = near or [other for stem in stems for other, path in known.items() if path.stem == stem]
    hint = f"did you mean {_either(near[:3])}?" if near else "`pear-megatron recipes list` shows them"
    raise RecipeError(f"no recipe {name!r} comes with the package; {hint}")


def _either(names: list[str]) -> str:
    return " or ".join(names)


def recipe_file(given: str | Path, folder: str | None = None, *, base: Path | None = None) -> Path:
    """The absolute path of a recipe that a user names.

    Args:
        given: a path, or ``pear:NAME`` for one that comes with the package.
        folder: see ``find_shipped``.
        base: the folder that a relative path starts from; None = the current one.
    """
    text = str(given)
    if text.startswith(PREFIX):
        return find_shipped(text, folder)
    return ((base or Path.cwd()) / text).resolve()


def about(path: Path) -> str:
    """The first sentence of a recipe's or a script's opening comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = 1 if lines and lines[0].startswith("#!") else 0
    comment = []
    for line in lines[start:]:
        if not line.startswith("#") or line.startswith("#  "):  # an indented line is a command
            break
        comment.append(line.lstrip("# "))
    words = " ".join(comment) or next((line.strip('"') for line in lines if line.startswith('"""')), "")
    return re.split(r"(?<=\.) ", words)[0].rstrip(".:")


def copy_recipe(name: str, destination: Path) -> list[Path]:
    """Copies a recipe; what it inherits from stays in the package, as ``pear:NAME``.

    A recipe for NeMo-RL, which reads it by itself and knows no ``pear:``, takes its parents along.

    Args:
        name: see ``find_shipped``.
        destination: a folder, or the ``.yaml`` file to write; the folder is made.

    Returns:
        The files written, the recipe first.

    Raises:
        RecipeError: no such recipe, or a file is there already.
    """
    source = find_shipped(name)
    to_file = destination.suffix in (".yaml", ".yml")
    target = destination if to_file else destination / source.name
    if source.parent.name == NEMO_RL:
        chain = _chain(source)
        texts = {target: source.read_text(encoding="utf-8")}
        texts |= {target.parent / parent.name: parent.read_text(encoding="utf-8") for parent in chain[1:]}
        if len(texts) < len(chain):
            raise RecipeError(
                f"{target} has the name of a parent of {name}, which is copied beside it; choose another"
            )
    else:
        texts = {target: _with_shipped_parents(source)}
    if there := [path for path in texts if path.exists()]:
        raise RecipeError(
            f"{_either([str(path) for path in there])} exists already; remove it, or name another place"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _chain(source: Path) -> list[Path]:
    """A recipe and those it inherits from in the same folder."""
    parents = [
        match[2] for match in _PATHS.finditer(source.read_text(encoding="utf-8")) if match[1] == "defaults: "
    ]
    return [source, *(file for parent in parents for file in _chain(source.parent / parent))]


def _with_shipped_parents(source: Path) -> str:
    root = shipped_folder("recipes").resolve()

    def rename(match: re.Match[str]) -> str:
        return f"{match[1]}{PREFIX}{(source.parent / match[2]).resolve().relative_to(root).as_posix()}"

    return _PATHS.sub(rename, source.read_text(encoding="utf-8"))


def slurm_scripts() -> dict[str, Path]:
    """Name -> file, for what is in slurm/."""
    return {path.name: path for path in sorted(shipped_folder("slurm").glob("[!.]*")) if path.is_file()}


def find_script(name: str) -> Path:
    """A file of slurm/; RecipeError, with the closest name, where there is none."""
    known = slurm_scripts()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise RecipeError(f"no Slurm script {name!r}; {hint}")
    return known[name]


def copy_slurm(destination: Path) -> list[Path]:
    """Copies slurm/, whose scripts need one another, with this Python as cluster.env's PEAR_PYTHON."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise RecipeError(f"{destination} exists already; remove it, or name another folder")
    destination.mkdir(parents=True, exist_ok=True)
    written = [Path(shutil.copy(path, destination)) for path in slurm_scripts().values()]
    for path in written:
        if path.suffix == ".sh":  # srun starts node.sh
            path.chmod(path.stat().st_mode | 0o111)
    settings = destination / "cluster.env"
    settings.write_text(
        _PYTHON.sub(lambda _: f"export PEAR_PYTHON={sys.executable}", settings.read_text(encoding="utf-8")),
        encoding="utf-8",
    )
    return written
