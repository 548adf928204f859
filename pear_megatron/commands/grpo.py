"""`pear-megatron grpo`: start NeMo-RL's GRPO from a checkpoint, after everything that can be checked was."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Example: pear-megatron grpo --config recipes/grpo/qwen2.5-7b.yaml --checkpoint results/sft/qwen2.5-7b/export "
    "grpo.max_num_steps=200 --dry-run"
)


class Engine(StrEnum):
    """Who runs GRPO."""

    nemo_rl = "nemo-rl"
    trl = "trl"


def grpo(
    config: Annotated[
        Path,
        typer.Option(help="a recipe: recipes/grpo/* (nemo-rl), recipes/grpo_trl/* (trl)", show_default=False),
    ],
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="what RL starts from: the output of export, a run, or one of its checkpoints",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value; +key=value for keys NeMo-RL's files do not show", show_default=False),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="nemo-rl: what NEMO_RL_DIR names; trl: here, on one GPU or the CPU")
    ] = Engine.nemo_rl,
    output: Annotated[Path | None, typer.Option(help="trl: folder of the run", show_default=False)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="nemo-rl: check everything, print the command, start nothing")
    ] = False,
) -> None:
    """Run GRPO from a checkpoint. Exit code 1, before anything starts, if it would fail."""
    from pear_megatron.errors import RecipeError

    if engine is Engine.trl:
        if output is None or dry_run:
            raise RecipeError("--engine trl needs --output DIR, and has no --dry-run")
        from pear_megatron.rl.trl.grpo import run
        from pear_megatron.rl.trl.recipe import load_trl_recipe

        print(f"done: {run(load_trl_recipe(config, list(overrides or [])), checkpoint, output)}")
        return
    if output is not None:
        raise RecipeError("--output is for --engine trl; NeMo-RL's folder is checkpointing.checkpoint_dir")
    from pear_megatron.rl.nemo_rl.launch import prepare

    launch = prepare(config, checkpoint, list(overrides or []))
    for key, old, new in launch.recipe.differences():
        print(f"  {key}: {new!r} (NeMo-RL: {old!r})", file=sys.stderr)
    print(launch.sizes, file=sys.stderr)
    for note in launch.notes:
        print(f"note: {note}", file=sys.stderr)
    if dry_run:
        print(launch.shell())
    else:
        launch.run()
