"""Puts comparisons' results into docs/study: numbers as JSON, pictures, and the tables of docs/study.md.

Tables stand between `<!-- table NAME -->` and `<!-- end -->`; `<!-- tuning NAME -->`, `<!-- styles NAME -->`,
`<!-- lengths NAME -->` and `<!-- foretold NAME -->` likewise.

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
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import spearmanr

from examples.launch import REPOSITORY
from examples.steps.styles import first_steps_right, plain_steps, read_problems
from examples.stretches import weigh
from pear_megatron.compare.markdown import markdown_table
from pear_megatron.compare.recipe import folder_name
from pear_megatron.compare.table import show
from pear_megatron.evaluate.statistics import over_runs
from pear_megatron.pages.figures import INK, line_style, new_figure, tidy, write_dark_twin, write_png
from pear_megatron.storage import write_atomically

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


def steps_styles(folder: Path, results: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """What the answers of the steps world are like, for each arm and measure a number a seed."""
    problems = read_problems(REPOSITORY / "results" / "steps" / "teacher" / "heldout.jsonl")
    found: dict[str, dict[str, list[float]]] = {}
    for arm in results["arms"]:
        cells = [folder / f"seed{seed}" / folder_name(arm) for seed in results["seeds"]]
        before = np.round([plain_steps(cell / "before", problems) for cell in cells], 5)
        after = np.round([plain_steps(cell / "after", problems) for cell in cells], 5)
        first = np.round([first_steps_right(cell / "before", problems) for cell in cells], 5)
        found[arm] = {
            "plain share before RL": before[:, 0].tolist(),
            "plain steps that are right, before RL": before[:, 1].tolist(),
            "first steps that are right, before RL": first.tolist(),
            "plain share after RL": after[:, 0].tolist(),
        }
    return found


def stretches_styles(folder: Path, results: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """What the answers of the stretches world are like, for each arm and measure a number a seed."""
    recipe = results["recipe"]
    prepared = Path(recipe["prepared_dir"]) if recipe["prepared_dir"] else folder / "prepared"
    found: dict[str, dict[str, list[float]]] = {}
    for arm in results["arms"]:
        cells = [(seed, folder / f"seed{seed}" / folder_name(arm)) for seed in results["seeds"]]
        before = [float(weigh.careful_shares(cell / "before").mean()) for _, cell in cells]
        after = [float(weigh.careful_shares(cell / "after").mean()) for _, cell in cells]
        problems = [prepared / f"seed{seed}" / "data" / "heldout.jsonl" for seed, _ in cells]
        right = np.round(
            [
                weigh.ends_right(cell / "before", path)
                for (_, cell), path in zip(cells, problems, strict=True)
            ],
            5,
        )
        found[arm] = {
            "careful share before RL": np.round(before, 5).tolist(),
            "careful stretches that end right, before RL": right[:, 0].tolist(),
            "first stretches that end right, before RL": right[:, 1].tolist(),
            "careful share after RL": np.round(after, 5).tolist(),
        }
    return found


def styles_table(results: dict[str, Any]) -> str:
    """A row an arm: means over seeds with 95 % intervals."""
    titles = list(next(iter(results["styles"].values())))
    lines = [f"| arm | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]
    for arm, measures in results["styles"].items():
        estimates = [over_runs(np.array(values), bounds=(0.0, 1.0)) for values in measures.values()]
        lines.append(
            f"| {arm} | " + " | ".join(f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in estimates) + " |"
        )
    return "\n".join(lines) + "\n"


def lengths_table(results: dict[str, Any]) -> str:
    """What a shorter RL would have given: a row an arm, the mean reward of the ten steps up to some lengths.

    Differences from the baseline on the same seeds, in bold, where their 95 % interval does not contain 0.
    """
    rewards = {arm: np.array(found["rewards"]) for arm, found in results["arms"].items()}
    longest = next(iter(rewards.values())).shape[1]
    lengths = [n for n in (20, 40, 60, 80, 120, 200) if n <= longest]
    lines = [f"| RL steps | {' | '.join(map(str, lengths))} |", "| --- |" + " ---: |" * len(lengths)]
    for arm, found in rewards.items():
        cells = []
        for n in lengths:
            at, base = (curve[:, n - 10 : n].mean(axis=1) for curve in (found, rewards[results["baseline"]]))
            cells.append(f"{at.mean():.3f}")
            difference = show(
                over_runs(at - base, bounds=(-1.0, 1.0)), "mean_reward", signed=True, known=True
            )
            if difference.clear:
                cells[-1] += f" **{difference}**"
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def foretold_table(results: dict[str, Any]) -> str:
    """A row a measure taken before RL: how well it says when RL takes off.

    In how many runs the arm took off before the baseline of its seed where its measure is higher, or after it where it
    is lower (runs that took off at the baseline's step, or neither of them at all, are left out); the same without the
    arms that took off in no seed; and the rank correlation, over arms, of the means.
    """
    arms, base = results["arms"], results["baseline"]
    never = float(len(arms[base]["rewards"][0]))
    steps = {
        arm: np.array([never if s is None else s for s in found["take_off"]]) for arm, found in arms.items()
    }
    lines = [
        "| before RL | runs that it foretold | without arms that never took off | rank correlation over arms |",
        "| --- | ---: | ---: | ---: |",
    ]
    for title in results["styles"][base]:
        if not title.endswith(" before RL"):
            continue
        found = {arm: np.array(styles[title]) for arm, styles in results["styles"].items()}
        hits = {
            arm: ((found[arm] - found[base]) * (steps[base] - steps[arm]))[steps[arm] != steps[base]] > 0
            for arm in arms
            if arm != base
        }
        some = [hit for arm, hit in hits.items() if (steps[arm] < never).any()]
        counts = [np.concatenate(chosen) for chosen in (list(hits.values()), some)]
        means = [[values[arm].mean() for arm in arms] for values in (found, steps)]
        lines.append(
            f"| {title.removesuffix(' before RL').removesuffix(',')} | "
            + " | ".join(f"{hit.sum()} of {len(hit)}" for hit in counts)
            + f" | {spearmanr(*means).statistic:.2f} |"
        )
    return "\n".join(lines) + "\n"


_ARMS = ("SFT", "shuffled", "token", "sequence")  # of README's picture


def starts_figure(results: dict[str, Any]) -> Figure:
    """README's picture: what the arms write before RL, and when RL takes off; a dot a seed, a bar the mean."""
    figure = new_figure(8.4, 2.3)
    left, right = figure.subplots(1, 2, sharey=True)
    base = np.array(results["arms"]["SFT"]["take_off"])
    for i, arm in enumerate(_ARMS):
        shares = np.array(results["styles"][arm]["careful share before RL"])
        later = np.array(results["arms"][arm]["take_off"]) - base  # paired: the same seed
        for axes, values in ((left, shares), (right, later)):
            axes.plot(
                values, np.full(len(values), i), "o", color=line_style(i)["color"], markersize=5, alpha=0.4
            )
            axes.plot(values.mean(), i, "|", color=line_style(i)["color"], markersize=18, markeredgewidth=2.5)
    left.set_title("careful stretches before RL", fontsize=10)
    right.set_title("steps until RL takes off, against SFT", fontsize=10)
    left.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_xlabel("earlier        later", fontsize=9)
    right.xaxis.set_label_coords(-right.get_xlim()[0] / np.ptp(right.get_xlim()), -0.16)
    right.axvline(0, color=INK, linewidth=0.6)
    left.set_yticks(range(len(_ARMS)), ["SFT", "weights shuffled", "PEAR token", "PEAR sequence"])
    left.set_ylim(len(_ARMS) - 0.5, -0.5)
    for axes in (left, right):
        tidy(axes, grid="x")
    return figure


def fill(text: str, name: str, results: dict[str, Any]) -> str:
    """The document with the tables of one comparison put in the place of what was there."""
    tables = {"table": markdown_table(results)}
    if results["tuning"]:
        tables["tuning"] = tuning_table(results)
    if "styles" in results:
        tables["styles"] = styles_table(results)
    if f"<!-- lengths {name} -->" in text:
        tables["lengths"] = lengths_table(results)
    if f"<!-- foretold {name} -->" in text:
        tables["foretold"] = foretold_table(results)
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
            results["styles"] = stretches_styles(folder, results)
        elif name.startswith("steps"):
            results["styles"] = steps_styles(folder, results)
        NUMBERS.mkdir(exist_ok=True)
        write_atomically(NUMBERS / f"{name}.json", json.dumps(results, separators=(",", ":")) + "\n")
        for picture in ("curves", "seeds"):
            copy = f"study_{name}_{picture}.png"
            if copy in STUDY.read_text():  # others nobody would see
                shutil.copyfile(folder / f"{picture}.png", IMAGES / copy)
        if name.startswith("stretches") and set(_ARMS) <= set(results["styles"]):
            write_png(starts_figure(results), IMAGES / f"study_{name}_starts.png")
            write_dark_twin(IMAGES / f"study_{name}_starts.png")
        write_atomically(STUDY, fill(STUDY.read_text(), name, results))


if __name__ == "__main__":
    main()
