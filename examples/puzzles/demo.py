"""`make demo-puzzles`: the main job on real input.

SmolLM2-135M-Instruct answers reasoning-gym puzzles at temperature 1; the log-probs it sampled with are the behaviour
log-probs, the grader's verdict is the reward; a small fresh model is trained on the answers for 20 steps on
Megatron-Core at TP = 2, with SmolLM2's tokenizer and its vocabulary of 49152.

Example:
    python -m examples.puzzles.demo --output results/puzzles
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.launch import RECIPES, announce, run, train
from examples.puzzles.sample import find_model

_COLUMNS = (
    "step",
    "loss",
    "nll",
    "grad_norm",
    "pear/weight",
    "pear/effective_sample_size",
    "tokens_per_second",
)


def report(metrics: list[dict[str, float]]) -> None:
    """A few steps of the run, as a table."""
    table = Table(title="20 steps of PEAR at TP = 2, vocabulary 49152 (metrics.jsonl)")
    for column in _COLUMNS:
        table.add_column(column.removeprefix("pear/").replace("_", " "), justify="right")
    for row in [*metrics[:1], *metrics[4::5]]:
        table.add_row(*(f"{row[column]:.4g}" for column in _COLUMNS))
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/puzzles"), metavar="DIR")
    parser.add_argument("--num-puzzles", type=int, default=48, help="default: 48")
    parser.add_argument("--wrong-reward", type=float, default=-0.1, help="of wrong answers (default: -0.1)")
    args = parser.parse_args(arguments)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    model = find_model()
    answers = output / "answers.jsonl"
    if not answers.exists():
        announce(f"SmolLM2-135M-Instruct answers {args.num_puzzles} puzzles at temperature 1 (a few minutes)")
        count = ["--num-puzzles", str(args.num_puzzles), "--wrong-reward", str(args.wrong_reward)]
        # One thread: between the many small steps of decoding more threads only wait for each other.
        command = ["-m", "examples.puzzles.make_data", "--out", str(answers), *count]
        run(command, output / "make_data.log", threads=1)
    print((output / "make_data.log").read_text().strip().splitlines()[-1])
    announce("training on the answers: torchrun, TP = 2, 20 steps")
    overrides = [f"data.train={answers}", f"data.tokenizer={model}"]
    train(RECIPES / "puzzles.yaml", output / "run", overrides)
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    report([json.loads(line) for line in lines])
    print(f"the run: {output / 'run'}")


if __name__ == "__main__":
    main()
