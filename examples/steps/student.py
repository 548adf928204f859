"""The student of the steps world: a small Llama that learns plain solutions, and is kept every hundred steps.

The earlier the checkpoint, the fewer of its teacher's steps it can follow; the comparisons start from three of them.
One student for all seeds; the same command continues. With --unanswered it learns the steps and never an answer, `#3`:
no reward without an offline phase. With --sorting it also learns to sort, as many lists as sums, so that RL can be on
another task than the offline data's; its folder gets the held-out lists.

Example:
    python -m examples.steps.student --teacher results/steps/teacher --output results/steps/student
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from filelock import FileLock

from examples.launch import RECIPES, announce, train
from examples.steps import rows, sorting, world

SEED = 3_000_000  # of reasoning-gym: other sums than the teacher's
NUM_HELDOUT = 300  # lists
PLAIN = 0.9


def make(
    teacher: Path, output: Path, *, num_solutions: int, answered: bool, sorts: bool, overrides: list[str]
) -> None:
    """Trains it, if that is not done."""
    settings = {"solutions": num_solutions, "answered": answered, "sorting": sorts, "train": overrides}
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".lock"):
        if rows.is_made(output, settings):
            return
        rng = np.random.default_rng(SEED)
        solved = [
            rows.trajectory(
                f"plain-{i:06d}", p.prompt, world.write_solution(rng, p, PLAIN, answered=answered)
            )
            for i, p in enumerate(world.problems(SEED, num_solutions))
        ]
        if sorts:
            solved += [
                rows.trajectory(f"sorted-{i:06d}", p.prompt, sorting.write_solution(p))
                for i, p in enumerate(sorting.problems(SEED, num_solutions))
            ]
            rows.write_problems(output / "heldout.jsonl", sorting.problems(world.HELDOUT_SEED, NUM_HELDOUT))
        rows.write_rows(output / "plain.jsonl", solved)
        announce(f"the student learns from {len(solved)} solutions")
        data = [f"data.train={output / 'plain.jsonl'}", f"data.tokenizer={teacher / 'tokenizer'}"]
        train(RECIPES / "steps_student.yaml", output / "run", [*data, *overrides], processes=1)
        rows.mark_made(output, settings)


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
    parser.add_argument(
        "--num-solutions", type=int, default=56_000, help="that it learns from (default: 56000)"
    )
    parser.add_argument("--sorting", action="store_true", help="it learns to sort as well")
    parser.add_argument("--unanswered", action="store_true", help="solutions end before the answer")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of its training")
    args = parser.parse_args(arguments)
    make(
        args.teacher.resolve(),
        args.output.resolve(),
        num_solutions=args.num_solutions,
        answered=not args.unanswered,
        sorts=args.sorting,
        overrides=args.overrides,
    )


if __name__ == "__main__":
    main()
