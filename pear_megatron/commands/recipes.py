"""`pear-megatron recipes` and `pear-megatron slurm`: what comes with the package, listed, shown and copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from pear_megatron.commands.errors import say_errors

recipes = typer.Typer(
    help="The recipes that come with the package; `pear:NAME` names one, for --config and in `defaults:`.",
    no_args_is_help=True,
)
slurm = typer.Typer(help="The sbatch scripts that come with the package.", no_args_is_help=True)

_RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="sft/qwen2.5-7b, or tiny where that is clear", show_default=False),
]


@recipes.command("list", epilog="Example: pear-megatron recipes list sft")
@say_errors
def list_recipes(
    folder: Annotated[
        str | None, typer.Argument(help="sft, grpo, grpo_trl or compare", show_default=False)
    ] = None,
) -> None:
    """List the recipes, with what each is for."""
    from pear_megatron.errors import RecipeError
    from pear_megatron.recipe.shipped import shipped_recipes

    known = shipped_recipes()
    folders = sorted({name.partition("/")[0] for name in known})
    if folder not in (None, *folders):
        raise RecipeError(f"there is no folder {folder!r} of recipes; name one of {', '.join(folders)}")
    _print({name: path for name, path in known.items() if folder in (None, name.partition("/")[0])})


def _print(files: Mapping[str, Path]) -> None:
    from pear_megatron.recipe.shipped import about

    width = max(map(len, files))
    for name, path in files.items():
        print(f"{name:<{width}}  {about(path)}".rstrip())


@recipes.command("show", epilog="Example: pear-megatron recipes show sft/qwen2.5-7b")
@say_errors
def show_recipe(name: _RecipeArgument) -> None:
    """Print a recipe's file."""
    from pear_megatron.recipe.shipped import find_shipped

    print(find_shipped(name).read_text(encoding="utf-8"), end="")


@recipes.command("copy", epilog="Example: pear-megatron recipes copy sft/qwen2.5-7b mine.yaml")
@say_errors
def copy(
    name: _RecipeArgument,
    destination: Annotated[
        Path, typer.Argument(metavar="[DEST]", help="a folder, or a .yaml file to write")
    ] = Path("."),
) -> None:
    """Copy a recipe, to be changed. It goes on inheriting from the package; one for NeMo-RL takes its parents along."""
    from pear_megatron.recipe.shipped import copy_recipe

    for path in copy_recipe(name, destination):
        print(path)


@slurm.command("list", epilog="Example: pear-megatron slurm list")
@say_errors
def list_scripts() -> None:
    """List the scripts, with what each is for."""
    from pear_megatron.recipe.shipped import slurm_scripts

    _print(slurm_scripts())


@slurm.command("show", epilog="Example: pear-megatron slurm show sft.sbatch")
@say_errors
def show_script(
    name: Annotated[str, typer.Argument(metavar="NAME", help="as `list` shows it", show_default=False)],
) -> None:
    """Print a script."""
    from pear_megatron.recipe.shipped import find_script

    print(find_script(name).read_text(encoding="utf-8"), end="")


@slurm.command("copy", epilog="Example: pear-megatron slurm copy slurm; then edit slurm/cluster.env")
@say_errors
def copy_scripts(
    destination: Annotated[Path, typer.Argument(metavar="[DEST]", help="a new folder")] = Path("slurm"),
) -> None:
    """Copy all of them, which need one another; cluster.env then names this Python. Edit that file next."""
    from pear_megatron.recipe.shipped import copy_slurm

    for path in copy_slurm(destination):
        print(path)
