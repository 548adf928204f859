"""Puts comparisons' results into docs/study: numbers as JSON, pictures, and the tables of docs/study.md.

Tables stand between `<!-- table NAME -->` and `<!-- end -->`; `<!-- tuning NAME -->` and `<!-- careful NAME -->`
likewise.

Example:
    python -m examples.publish_study results/compare/stretches results/compare/stretches_rare
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from examples.launch import REPOSITORY
from examples.stretches import weigh
from pear_megatron.atomic import write_atomically
from pear_megatron.compare.markdown import markdown_table
from pear_megatron.compare.recipe import folder_name
from pear_megatron.evaluate.statistics import over_runs

STUDY = REPOSITORY / "docs" / "study.md"
NUMBERS = REPOSITORY / "docs" / "study"
IMAGES = REPOSITORY / "docs" / "images"


def tuning_table(results: dict[str, Any]) -> str:
    """A row an arm: the mean reward during RL for each value tried, the chosen one in bold."""
    values = list(next(iter(results["tuning"].values())))
    lines = [
        f"| {results['recipe']['tune']['key']} | {' | '.join(values)} |",
        "| --- |" + " ---: |" * len(values),
    ]
    for arm, tried in results["tuning"].items():
        best = max(tried, key=lambda value: tried[value])
        cells = [f"**{tried[v]:.3f}**" if v == best else f"{tried[v]:.3f}" for v in values]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def careful_shares(folder: Path, results: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """In the stretches world, each arm's share of careful stretches before and after RL, a number a seed."""
    return {
        arm: {
            when: [
                round(float(weigh.careful_shares(folder / f"seed{seed}" / folder_name(arm) / when).mean()), 5)
                for seed in results["seeds"]
            ]
            for when in ("before", "after")
        }
        for arm in results["arms"]
    }


def careful_table(results: dict[str, Any]) -> str:
    """A row an arm: means over seeds with 95 % intervals."""
    lines = ["| careful share of held-out answers | before RL | after RL |", "| --- | ---: | ---: |"]
    for arm, shares in results["careful_share"].items():
        estimates = [over_runs(np.array(values), bounds=(0.0, 1.0)) for values in shares.values()]
        cells = " | ".join(f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in estimates)
        lines.append(f"| {arm} | {cells} |")
    return "\n".join(lines) + "\n"


def fill(text: str, name: str, results: dict[str, Any]) -> str:
    """The document with the tables of one comparison put in the place of what was there."""
    tables = {"table": markdown_table(results)}
    if results["tuning"]:
        tables["tuning"] = tuning_table(results)
    if "careful_share" in results:
        tables["careful"] = careful_table(results)
    for kind, table in tables.items():
        pattern = re.compile(rf"(<!-- {kind} {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}{match[2]}", text)
    return text


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.publish_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="output_dir of a comparison")
    for folder in parser.parse_args(arguments).folders:
        name, results = folder.name, json.loads((folder / "results.json").read_text())
        for part in ("offline", "rl"):  # resolved paths are of the machine that ran it
            _, _, below = results["recipe"][part]["recipe"].rpartition("/recipes/")
            results["recipe"][part]["recipe"] = f"recipes/{below}"
        if name.startswith("stretches"):
            results["careful_share"] = careful_shares(folder, results)
        NUMBERS.mkdir(exist_ok=True)
        write_atomically(NUMBERS / f"{name}.json", json.dumps(results, separators=(",", ":")) + "\n")
        for picture in ("curves", "seeds"):
            shutil.copyfile(folder / f"{picture}.png", IMAGES / f"study_{name}_{picture}.png")
        write_atomically(STUDY, fill(STUDY.read_text(), name, results))


if __name__ == "__main__":
    main()
