"""run_and_report: a comparison, its files in output_dir, and its table on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pear_megatron.compare import figures
from pear_megatron.compare.cell import tuning_cells
from pear_megatron.compare.outcome import CellResult, Outcome, read_cell
from pear_megatron.compare.page import page
from pear_megatron.compare.recipe import CompareRecipe
from pear_megatron.compare.run import Comparison
from pear_megatron.compare.table import make_table
from pear_megatron.pages.figures import write_png
from pear_megatron.storage import lock, write_atomically


def run_and_report(recipe: CompareRecipe, jobs: int | None = None) -> Outcome:
    """Runs what is missing, and writes results.json, index.html and the pictures each time a seed is done."""
    root = Path(recipe.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []

    def write(results: list[CellResult], chosen: dict[str, tuple[str, ...]]) -> None:
        outcome = Outcome(recipe, chosen, results, _tuning(recipe))
        write_atomically(root / "results.json", json.dumps(outcome.as_json(), indent=1) + "\n")
        write_atomically(root / "index.html", page(outcome))
        write_png(figures.learning_curves(outcome, width=8.4), root / "curves.png")
        write_png(figures.every_seed(outcome), root / "seeds.png")
        outcomes.append(outcome)

    with lock(root, "pear-megatron compare", other="output_dir", patience=0.0):
        Comparison(recipe, jobs, on_seed=write).run()
    return outcomes[-1]  # the last cell completes the last seed


def _tuning(recipe: CompareRecipe) -> dict[str, dict[float, float]]:
    return {
        arm: {value: read_cell(cell).mean_reward for value, cell in by_value.items()}
        for arm, by_value in tuning_cells(recipe).items()
    }


def print_table(outcome: Outcome) -> None:
    """Means, and below each the difference from the baseline."""
    found = make_table(outcome.as_json())
    against = f"difference from {outcome.recipe.baseline}, paired"
    table = Table(title=f"{found.num_seeds} seed(s); 95 % intervals; second lines: {against}")
    table.add_column("arm")
    for title in found.titles:
        table.add_column(title, justify="right")
    for row in found.rows:
        table.add_row(row.arm, *map(str, row.means))
        if row.differences is not None:
            table.add_row("", *map(str, row.differences), style="dim", end_section=True)
    Console(highlight=False, width=max(120, Console().width)).print(table)
