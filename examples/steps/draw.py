"""What a seed of a comparison in the steps world has of its own: draws from the teacher's pool, and problems.

    offline.parquet    trajectories drawn from the teacher's right solutions, with its log-probs
    negatives.parquet  trajectories drawn from its wrong ones, reward -1
    problems.jsonl     sums for RL, or lists to sort, and their grader (.py)

Example:
    python -m examples.steps.draw --teacher results/steps/teacher --output results/steps/seed0 --seed 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from examples.steps import rows, sorting, world


def draw(source: Path, output: Path, rng: np.random.Generator, count: int) -> None:
    """``count`` rows of a Parquet file, drawn without putting back."""
    table = pq.read_table(source)
    if table.num_rows < count:
        raise SystemExit(
            f"error: {source} has {table.num_rows} rows, {count} are asked for: let the teacher solve more sums"
        )
    partial = output.with_suffix(".partial")
    pq.write_table(table.take(rng.permutation(table.num_rows)[:count]), partial)
    partial.replace(output)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.steps.draw",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--teacher", type=Path, required=True, metavar="DIR", help="of examples.steps.teacher"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: 0)")
    for name, default in (("offline", 3_000), ("negatives", 500), ("problems", 3_000)):
        parser.add_argument(
            f"--num-{name}", type=int, default=default, metavar="N", help=f"default: {default}"
        )
    parser.add_argument("--sorting", action="store_true", help="problems are lists to sort instead of sums")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    # A generator per file, so that the size of one changes nothing in the other.
    offline, negatives = (np.random.default_rng(c) for c in np.random.SeedSequence(args.seed).spawn(2))
    draw(args.teacher / "right.parquet", args.output / "offline.parquet", offline, args.num_offline)
    draw(args.teacher / "wrong.parquet", args.output / "negatives.parquet", negatives, args.num_negatives)
    problems = (sorting if args.sorting else world).problems(args.seed, args.num_problems)
    rows.write_problems(args.output / "problems.jsonl", problems)


if __name__ == "__main__":
    main()
