"""`pear-megatron grpo`: start NeMo-RL's GRPO from a checkpoint, after everything that can be checked was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Example: pear-megatron grpo --config recipes/grpo/qwen2.5-7b.yaml --checkpoint results/sft/qwen2.5-7b/export "
    "grpo.max_num_steps=200 --dry-run"
)


def grpo(
    config: Annotated[
        Path, typer.Option(help="a NeMo-RL recipe, such as recipes/grpo/*", show_default=False)
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the command on stdout, start nothing")
    ] = False,
) -> None:
    """Run GRPO with the NeMo-RL that NEMO_RL_DIR names. Exit code 1, before anything starts, if it would fail."""
    from pear_megatron.errors import PearError

    try:
        from pear_megatron.rl.nemo_rl_launch import prepare

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
    except PearError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
