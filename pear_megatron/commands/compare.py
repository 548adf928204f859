"""`pear-megatron compare`: arms x seeds of an offline phase, the same GRPO after it, and what came of both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = (
    "Example: pear-megatron compare --config recipes/compare/stretches.yaml    (on fewer seeds: 'seeds=[0,1,2]'). "
    "The same command continues what was stopped."
)


def compare(
    config: Annotated[Path, typer.Option(help="recipes/compare/NAME.yaml", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the comparison", show_default=False)
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="runs at once; default: one a core, or one where there is a GPU", show_default=False
        ),
    ] = None,
) -> None:
    """Run every arm on every seed: offline phase, evaluation, the same GRPO, evaluation; compare them.

    Writes results.json, index.html and pictures into output_dir, as soon as one seed is complete.
    """
    import warnings

    warnings.filterwarnings("ignore")
    from pear_megatron.compare.recipe import load_compare_recipe

    recipe = load_compare_recipe(config, list(overrides or []))
    # Slow: after what a recipe can get wrong.
    from pear_megatron.compare.report import print_table, run_and_report

    outcome: Any = run_and_report(recipe, jobs)
    print_table(outcome)
    print(f"page, pictures and results.json: {recipe.output_dir}")
