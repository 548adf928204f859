"""Outcomes made by hand: cells whose numbers are chosen, with the folders that checks read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pear_megatron.compare.cell import Cell, cells_of
from pear_megatron.compare.outcome import CellResult, Outcome
from pear_megatron.compare.recipe import CompareRecipe, load_compare_recipe
from pear_megatron.evaluate.results import ProblemResult, Results
from tests.compare import tiny


def recipe(folder: Path, **changes: Any) -> CompareRecipe:
    return load_compare_recipe(tiny.write(folder, **changes))


def evaluation(rights: list[int], samples: int = 2) -> Results:
    """Of problems of which that many samples are right."""
    problems = [ProblemResult(f"p{i}", right, right / samples, 5.0, 0.0) for i, right in enumerate(rights)]
    return Results({"num_samples": samples, "max_new_tokens": 33}, 1.0, [1, 2], problems)


def result(cell: Cell, rewards: list[float], before: list[int], after: list[int]) -> CellResult:
    return CellResult(cell, np.array(rewards), evaluation(before), evaluation(after))


def outcome(recipe: CompareRecipe, rewards: dict[str, list[list[float]]]) -> Outcome:
    """``rewards``: arm -> a curve a seed; of 4 problems none is solved before, and one more a seed after."""
    results = [
        result(cell, rewards[cell.arm][recipe.seeds.index(cell.seed)], [0] * 4, [2, 1, 0, cell.seed % 3])
        for cell in cells_of(recipe, {})
    ]
    return Outcome(recipe, {}, results, {})


def write_folders(results: list[CellResult]) -> None:
    """What a cell's stages leave for ``check_seed``: three offline steps, two of RL, two evaluations."""
    for one in results:
        cell = one.cell
        if cell.has_offline_phase:
            write_rows(cell.folder / "run", [{"step": i, "trajectories": f"t{i}"} for i in (1, 2, 3)])
        write_rows(cell.folder / "rl", [{"step": i, "problems": f"p{i}"} for i in (1, 2)])
        described = {**cell.rl.model_dump(mode="json"), "weights": f"of {cell.arm}"}
        (cell.folder / "rl" / "config.yaml").write_text(yaml.safe_dump(described))
        for name in ("before", "after"):
            (cell.folder / name).mkdir()
            settings = {"model": cell.arm, "weights": cell.arm, "problems": "x", "seed": cell.seed}
            (cell.folder / name / "settings.json").write_text(json.dumps(settings))


def change_row(path: Path, step: int, **values: Any) -> None:
    """Puts other values into a row of a metrics.jsonl."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[step - 1] |= values
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """As metrics.jsonl."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
