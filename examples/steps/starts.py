"""What each offline phase of the steps world makes of each student, before any RL: pass@k, and what it writes.

For every student (three points of one training), arm and seed: the offline phase, export, evaluation on the held-out
sums. Writes OUTPUT/starts.json and prints the table of docs/study.md. The same command continues.

Example:
    python -m examples.steps.starts --output results/steps/starts
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from examples.launch import REPOSITORY, command, run, train
from examples.steps import world
from pear_megatron.compare.recipe import folder_name, load_compare_recipe
from pear_megatron.evaluate.results import read_results
from pear_megatron.evaluate.statistics import holm, interval, p_value
from pear_megatron.storage import write_atomically

STUDENTS = (200, 300, 600)  # steps of its own training
SHARED = REPOSITORY / "results" / "steps"


def make(cell: Path, student: int, overrides: list[str] | None, data: Path) -> dict[str, list[float]]:
    """One cell: its results over the held-out problems, [P] each."""
    cell.mkdir(parents=True, exist_ok=True)
    base, heldout = SHARED / "student" / "run" / "checkpoints" / f"iter_{student:07d}", SHARED / "teacher"
    if not (cell / "export").is_dir():
        checkpoint = base
        if overrides is not None:
            checkpoint = cell / "run"
            given = [f"checkpoint.pretrained={base}", f"data.train={data / 'offline.parquet'}"]
            tokenizer = f"data.tokenizer={SHARED / 'teacher' / 'tokenizer'}"
            recipe = REPOSITORY / "recipes" / "sft" / "steps.yaml"
            train(recipe, checkpoint, [*given, tokenizer, *overrides], processes=1)
        command(cell, "export", "--checkpoint", checkpoint, "--output", cell / "export")
    command(
        cell, "eval", "--model", cell / "export", "--problems", heldout / "heldout.jsonl",
        "--grader", heldout / "heldout.py", "--num-samples", "4", "--max-new-tokens", str(world.LONGEST),
        "--batch-size", "600", "--output", cell / "before",
    )  # fmt: skip
    results = read_results(cell / "before")
    problems = {
        row["id"]: world.Problem(row["prompt"], row["answer"])
        for row in map(json.loads, (heldout / "heldout.jsonl").read_text().splitlines())
    }
    plain: dict[str, list[float]] = {name: [] for name in problems}
    for row in map(json.loads, (cell / "before" / "samples.jsonl").read_text().splitlines()):
        steps = world.steps(problems[row["id"]], row["response"])
        plain[row["id"]].append(sum(size == 1 for size, _ in steps) / (world.TERMS - 1))
    return {
        "pass@1": results.values("pass@1").tolist(),
        "pass@4": results.values("pass@4").tolist(),
        "plain share": [float(np.mean(shares)) for shares in plain.values()],
    }


def table(results: dict[str, dict[str, list[dict[str, list[float]]]]]) -> str:
    """Markdown: a row per student and arm; differences from SFT, paired, where clear of 0; † after Holm."""
    measures = ("plain share", "pass@1", "pass@4")
    lines = [
        f"| student, after | arm | {' | '.join(measures)} |",
        "| --- | --- |" + " ---: |" * len(measures),
    ]
    for student, arms in results.items():
        values = {
            arm: {m: np.array([cell[m] for cell in cells]) for m in measures} for arm, cells in arms.items()
        }
        others = [arm for arm in values if arm != "SFT"]
        changes = {(arm, m): values[arm][m] - values["SFT"][m] for arm in others for m in measures}
        corrected = {
            m: dict(zip(others, holm([p_value(changes[arm, m]) for arm in others]), strict=True))
            for m in measures
        }
        for arm, found in values.items():
            cells = []
            for m in measures:
                text = str(interval(found[m], bounds=(0.0, 1.0)))
                if arm != "SFT":
                    difference = interval(changes[arm, m], bounds=(-1.0, 1.0))
                    if difference.low > 0.0 or difference.high < 0.0:
                        mark = " †" if corrected[m][arm] < 0.05 else ""
                        text += f"<br>**{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]{mark}**"
                cells.append(text)
            lines.append(f"| {student} steps | {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.steps.starts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="0 to N - 1 (default: 2)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cells at once (default: 2)")
    args = parser.parse_args(arguments)
    output = args.output.resolve()
    arms = load_compare_recipe(REPOSITORY / "recipes" / "compare" / "steps.yaml", []).arms
    for seed in range(args.seeds):
        if not (output / f"data{seed}" / "problems.jsonl").exists():
            (output / f"data{seed}").mkdir(parents=True, exist_ok=True)
            drawn = ["--output", str(output / f"data{seed}"), "--seed", str(seed)]
            run(
                ["-m", "examples.steps.draw", "--teacher", str(SHARED / "teacher"), *drawn],
                output / f"data{seed}.log",
            )
    cells = [
        (student, arm, seed)
        for seed in range(args.seeds)
        for student in STUDENTS
        for arm, overrides in arms.items()
        if overrides is not None or seed == 0
    ]

    def one(cell: tuple[int, str, int]) -> dict[str, list[float]]:
        student, arm, seed = cell
        extra = None if arms[arm] is None else [*arms[arm], f"seed={seed}"]
        return make(
            output / str(student) / folder_name(arm) / str(seed), student, extra, output / f"data{seed}"
        )

    results: dict[str, dict[str, list[dict[str, list[float]]]]] = {
        str(student): {arm: [] for arm in arms} for student in STUDENTS
    }
    with ThreadPoolExecutor(args.jobs) as pool:
        for (student, arm, _), found in zip(cells, pool.map(one, cells), strict=True):
            results[str(student)][arm].append(found)
    write_atomically(output / "starts.json", json.dumps(results))
    print(table(results), end="")


if __name__ == "__main__":
    main()
