"""What one seed of a comparison in the steps world starts from: a student's base model, its offline data, problems.

    base/             a small Llama that learned short sums (3 to 5 terms) and base conversions from programs, briefly
    offline.parquet   trajectories drawn from the teacher's right solutions of eight-term sums, with its log-probs
    negatives.parquet trajectories drawn from its wrong ones, reward -1
    problems.jsonl    eight-term sums for RL       } a grader (.py) stands beside each
    shifted.jsonl     base conversions for RL      }

Two students of the same seed but different sizes see the same rows. The same command continues.

Example:
    python -m examples.steps.student --teacher results/steps/teacher --output results/steps/seed0 --seed 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from examples.launch import RECIPES, announce, train
from examples.steps import rows, world

BASE_TERMS = (3, 5)
BASE_PLAIN = 0.9


def make(
    teacher: Path,
    output: Path,
    *,
    seed: int,
    overrides: list[str],
    num_base: int,
    num_offline: int,
    num_negatives: int,
    num_problems: int,
) -> None:
    """Every step whose result is not there yet."""
    output.mkdir(parents=True, exist_ok=True)
    # A generator per file, so that the size of one changes nothing in the others.
    base_rng, offline_rng, negatives_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    draw(teacher / "right.parquet", output / "offline.parquet", offline_rng, num_offline)
    draw(teacher / "wrong.parquet", output / "negatives.parquet", negatives_rng, num_negatives)
    rows.write_problems(output / "problems.jsonl", world.problems("sums", 10 * seed + 1, num_problems))
    rows.write_problems(output / "shifted.jsonl", world.problems("bases", 10 * seed + 2, num_problems))
    if (output / "base" / "checkpoints" / "latest_checkpointed_iteration.txt").exists():
        return
    taught = [
        problem
        for pair in zip(
            world.problems("sums", 10 * seed + 3, num_base // 2, terms=BASE_TERMS),
            world.problems("bases", 10 * seed + 4, num_base // 2),
            strict=True,
        )
        for problem in pair
    ]
    rows.write_rows(
        output / "base.jsonl",
        (
            rows.trajectory(f"base-{i:06d}", p.prompt, world.write_solution(base_rng, p, BASE_PLAIN))
            for i, p in enumerate(taught)
        ),
    )
    announce(f"the student's base model, seed {seed}")
    data = [f"data.train={output / 'base.jsonl'}", f"data.tokenizer={teacher / 'tokenizer'}", f"seed={seed}"]
    train(RECIPES / "steps_base.yaml", output / "base", [*data, *overrides], processes=1)


def draw(source: Path, output: Path, rng: np.random.Generator, count: int) -> None:
    """``count`` rows of a Parquet file, drawn without putting back."""
    table = pq.read_table(source)
    if table.num_rows < count:
        raise SystemExit(
            f"error: {source} has {table.num_rows} rows, {count} are asked for: let the teacher solve more sums"
        )
    chosen = table.take(rng.permutation(table.num_rows)[:count])
    pq.write_table(chosen, output.with_suffix(".partial"))
    output.with_suffix(".partial").replace(output)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.steps.student",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--teacher", type=Path, required=True, metavar="DIR", help="of examples.steps.teacher"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: 0)")
    for name, default in (("base", 24_000), ("offline", 2_000), ("negatives", 500), ("problems", 2_000)):
        parser.add_argument(
            f"--num-{name}", type=int, default=default, metavar="N", help=f"default: {default}"
        )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the base model's training")
    args = parser.parse_args(arguments)
    make(
        args.teacher.resolve(),
        args.output.resolve(),
        seed=args.seed,
        overrides=args.overrides,
        num_base=args.num_base,
        num_offline=args.num_offline,
        num_negatives=args.num_negatives,
        num_problems=args.num_problems,
    )


if __name__ == "__main__":
    main()
