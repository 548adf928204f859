"""`pear-megatron grpo`: start GRPO from a checkpoint, after everything that can be checked was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pear_megatron.rl.engine import ENGINES

EPILOG = (
    "Example: pear-megatron grpo --config recipes/grpo/qwen2.5-7b.yaml --checkpoint results/sft/qwen2.5-7b/export "
    "grpo.max_num_steps=200 --dry-run"
)


def grpo(
    config: Annotated[Path, typer.Option(help="a recipe of the engine's", show_default=False)],
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
        str,
        typer.Option(
            metavar="|".join(ENGINES),
            help="; ".join(f"{name}: {about}" for name, (_, about) in ENGINES.items()),
        ),
    ] = "nemo-rl",
    output: Annotated[
        Path | None,
        typer.Option(help="folder of the run (not nemo-rl: its recipes name it)", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, start nothing; nemo-rl: print the command")
    ] = False,
) -> None:
    """Run GRPO from a checkpoint. Exit code 1, before anything starts, if it would fail."""
    from pear_megatron.errors import RecipeError
    from pear_megatron.rl.engine import find_engine

    chosen = find_engine(engine)
    if chosen.output and output is None and not dry_run:
        raise RecipeError(f"--engine {engine} needs --output DIR, the folder of the run")
    if output is not None and not chosen.output:
        raise RecipeError(f"--engine {engine} has no --output: its recipe names the folder of the run")
    if dry_run:
        print(chosen.dry_run(config, list(overrides or []), checkpoint))
    else:
        print(f"done: {chosen.run(config, list(overrides or []), checkpoint, output)}")
