"""The teacher of the steps world, and a pool of its solutions with their log-probs.

A Llama of 3.1M parameters learns from programs' solutions to sums of eight terms, most of them terse. Then it solves
other sums at temperature 1; its right solutions, scored by itself (`pear-megatron score`), are what offline data are
drawn from, and its wrong ones what negative examples are drawn from.

    tokenizer/        a token for each character
    teacher/          the teacher as a Hugging Face folder
    right.parquet     its right solutions with behavior_logprobs
    wrong.parquet     its wrong ones, reward -1
    heldout/          its evaluation on the held-out sums: how much of its own task it solves

Done once for all seeds of a comparison; the same command continues.

Example:
    python -m examples.steps.teacher --output results/steps/teacher
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from filelock import FileLock

from examples.launch import RECIPES, announce, command, train
from examples.steps import rows, world

TRAINING_SEED, POOL_SEED = 1_000_000, 2_000_000  # of reasoning-gym; a student's seeds are small numbers


def make(
    output: Path, *, plain: float, num_training: int, num_asked: int, num_heldout: int, overrides: list[str]
) -> None:
    """Every step whose result is not there yet."""
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        "plain": plain,
        "training": num_training,
        "asked": num_asked,
        "heldout": num_heldout,
        "train": overrides,
    }
    with FileLock(output / ".lock"):
        if rows.is_made(output, settings):
            return
        rows.save_tokenizer(output / "tokenizer")
        rng = np.random.default_rng(0)
        taught = world.problems(TRAINING_SEED, num_training)
        rows.write_rows(
            output / "taught.jsonl",
            (
                rows.trajectory(f"taught-{i:06d}", p.prompt, world.write_solution(rng, p, plain))
                for i, p in enumerate(taught)
            ),
        )
        rows.write_problems(output / "heldout.jsonl", world.problems(world.HELDOUT_SEED, num_heldout))
        rows.write_problems(output / "asked.jsonl", world.problems(POOL_SEED, num_asked))
        if not (output / "teacher").is_dir():
            announce(f"the teacher learns from {num_training} solutions")
            data = [f"data.train={output / 'taught.jsonl'}", f"data.tokenizer={output / 'tokenizer'}"]
            train(RECIPES / "steps_teacher.yaml", output / "run", [*data, *overrides], processes=1)
            command(output, "export", "--checkpoint", output / "run", "--output", output / "teacher")
        for name in ("heldout", "asked"):
            command(
                output, "eval", "--model", output / "teacher", "--problems", output / f"{name}.jsonl",
                "--grader", output / f"{name}.py", "--output", output / name, "--num-samples", "1",
                "--max-new-tokens", str(world.LONGEST), "--batch-size", "500",
            )  # fmt: skip
        for name, reward in (("right", 1.0), ("wrong", -1.0)):
            write_solutions(output, name, reward)
            command(
                output, "score", "--model", output / "teacher", "--data", output / f"{name}.jsonl",
                "--output", output / f"{name}.parquet", "--max-tokens-per-batch", "16384", "--top-k", "14",
            )  # fmt: skip
        rows.mark_made(output, settings)


def write_solutions(output: Path, name: str, reward: float) -> None:
    """The teacher's whole solutions that were graded right, or wrong, as trajectories."""
    prompts = {row["id"]: row["prompt"] for row in rows.read_rows(output / "asked.jsonl")}
    samples = [row for row in rows.read_rows(output / "asked" / "samples.jsonl") if not row["truncated"]]
    rows.write_rows(
        output / f"{name}.jsonl",
        (
            rows.trajectory(row["id"], prompts[row["id"]], row["response"], reward)
            for row in samples
            if (row["score"] >= 1.0) == (reward > 0.0)
        ),
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.steps.teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--plain",
        type=float,
        default=0.02,
        metavar="P",
        help="how many of its solutions are plain (default: 0.02)",
    )
    parser.add_argument("--num-training", type=int, default=120_000, help="solutions it learns from")
    parser.add_argument("--num-asked", type=int, default=16_000, help="sums that it solves for the pool")
    parser.add_argument("--num-heldout", type=int, default=300)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of its training")
    args = parser.parse_args(arguments)
    make(
        args.output.resolve(),
        plain=args.plain,
        num_training=args.num_training,
        num_asked=args.num_asked,
        num_heldout=args.num_heldout,
        overrides=args.overrides,
    )


if __name__ == "__main__":
    main()
