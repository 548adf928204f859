"""`pear-megatron eval-compare`: two evaluations, or two arms of several runs each, with a paired difference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Example: pear-megatron eval-compare results/eval/sft results/eval/pear --output results/eval/sft-pear    "
    "over seeds: pear-megatron eval-compare 'results/eval/sft-seed*' 'results/eval/pear-seed*'"
)
_WHAT = "folder of an evaluation, or its results.json; 'a,b,c' or a quoted glob = several runs"


def eval_compare(
    first: Annotated[str, typer.Argument(help=_WHAT, show_default=False)],
    second: Annotated[str, typer.Argument(help="the same, of the other model", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(help="folder for index.html, comparison.json and pass_at_k.png", show_default=False),
    ] = None,
) -> None:
    """Compare two evaluations of the same problems: second - first, paired by problem and run."""
    from rich.console import Console

    from pear_megatron.evaluate.figures import comparison_table, pass_at_k
    from pear_megatron.evaluate.page import page_of_two
    from pear_megatron.evaluate.paired import compare, read_arm, write_comparison
    from pear_megatron.pages.figures import write_png
    from pear_megatron.storage import write_atomically

    names, arms = (first, second), (read_arm(first), read_arm(second))
    comparison = compare(*arms)
    Console().print(comparison_table(names, comparison, len(arms[0])))
    if output is not None:
        write_comparison(output / "comparison.json", names, comparison)
        write_atomically(output / "index.html", page_of_two(names, arms, comparison))
        write_png(pass_at_k(dict(zip(names, arms, strict=True))), output / "pass_at_k.png")
        print(f"the same as a page: {output / 'index.html'}")
