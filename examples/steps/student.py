"""The student of the steps world: a small Llama that learns plain solutions, and is kept every hundred steps.

The earlier the checkpoint, the fewer of its teacher's steps it can follow; the comparisons start from three of them.
One student for all seeds; the same command continues. With --unanswered it learns the steps and never an answer, `#3`:
no reward without an offline phase.

Example:
    python -m examples.steps.student --teacher results/steps/teacher --output results/steps/student
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from filelock import FileLock

from examples.launch import RECIPES, announce, train
from examples.steps import rows, world

SEED = 3_000_000  # of reasoning-gym: other sums than the teacher's
PLAIN = 0.9


def make(teacher: Path, output: Path, num_solutions: int, answered: bool, overrides: list[str]) -> None:
    """Trains it, if that is not done."""
    settings = {"solutions": num_solutions, "answered": answered, "train": overrides}
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".lock"):
        if rows.is_made(output, settings):
            return
        rng = np.random.default_rng(SEED)
        rows.write_rows(
            output / "plain.jsonl",
            (
                rows.trajectory(
                    f"plain-{i:06d}", p.prompt, world.write_solution(rng, p, PLAIN, answered=answered)
                )
                for i, p in enumerate(world.problems(SEED, num_solutions))
            ),
        )
        announce(f"the student learns from {num_solutions} solutions")
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
    parser.add_argument("--unanswered", action="store_true", help="solutions end before the answer")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of its training")
    args = parser.parse_args(arguments)
    make(
        args.teacher.resolve(), args.output.resolve(), args.num_solutions, not args.unanswered, args.overrides
    )


if __name__ == "__main__":
    main()
