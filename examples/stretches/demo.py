"""`make demo`: plain SFT against PEAR on real Megatron-Core at TP = 2, then the same GRPO from each; no GPU.

The smallest comparison (recipes/compare/demo.yaml): one base model; from it plain SFT, PEAR token and PEAR sequence
on the same offline trajectories, whose behaviour log-probs are exact; held-out answers of each; the same GRPO (TRL)
from each; held-out answers again. Writes DIR/index.html, results.json and pictures.

The world is constructed to show what PEAR is for: see examples/stretches/world.py, and docs/study.md for all worlds.
Continues where it stopped: run it again after an interruption.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from examples.launch import REPOSITORY, announce
from examples.stretches import plots, weigh, world
from pear_megatron import PearConfig
from pear_megatron.compare.outcome import Outcome
from pear_megatron.compare.recipe import load_compare_recipe
from pear_megatron.compare.report import print_table, run_and_report
from pear_megatron.errors import PearError
from pear_megatron.evaluate.statistics import interval

RECIPE = REPOSITORY / "recipes" / "compare" / "demo.yaml"
_TRAJECTORIES = 512  # whose weights are drawn


def draw_weights(outcome: Outcome, output: Path) -> None:
    """PEAR's weights of real offline trajectories as each arm sees them at the end of its offline phase."""
    weights: dict[str, np.ndarray] = {}
    for arm in outcome.recipe.arms:
        cell = outcome.of(arm)[0].cell
        config = cell.offline.pear
        assert isinstance(config, PearConfig)
        if config.variant == "none":
            continue
        data = cell.prepared / "data" / "offline.jsonl"
        logprobs, behavior, responses = weigh.response_logprobs(cell.folder / "export", data, _TRAJECTORIES)
        weights[arm] = weigh.weigh(logprobs, behavior, config)
        careful = world.careful_stretches(responses)
    # The trajectories with the most careful stretches, and one with none: where the weights differ.
    order = np.argsort(-careful.sum(axis=1), kind="stable")
    chosen = [*order[:2], order[-1]]
    plots.plot_weights_over_positions(
        output / "weights_over_positions.png",
        {arm: w[chosen] for arm, w in weights.items()},
        careful[chosen],
        stretch_length=world.STRETCH_LENGTH,
    )
    plots.plot_weight_distributions(output / "weight_distributions.png", weights)


def print_careful_shares(outcome: Outcome) -> None:
    """How often each checkpoint writes what RL could reinforce."""
    table = Table("arm", title="careful share of held-out answers, 95 % intervals over problems")
    for when in ("before", "after"):
        table.add_column(f"{when} RL", justify="right")
    for arm in outcome.recipe.arms:
        cells = []
        for when in ("before", "after"):
            estimate = interval(
                weigh.careful_shares(outcome.of(arm)[0].cell.folder / when), bounds=(0.0, 1.0)
            )
            cells.append(f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]")
        table.add_row(arm, *cells)
    Console(highlight=False).print(table)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.stretches.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=RECIPE, help="the comparison (default: demo.yaml)")
    parser.add_argument("--output", type=Path, default=Path("results/demo"), metavar="DIR")
    parser.add_argument(
        "--seed", type=int, default=0, help="of data, weights, order and sampling (default: 0)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the comparison")
    args = parser.parse_args(arguments)
    started, output = time.monotonic(), args.output.resolve()
    overrides = [f"output_dir={output}", f"seeds=[{args.seed}]", *args.overrides]
    try:
        recipe = load_compare_recipe(args.config, overrides)
        announce(
            f"{world.NUM_OPERATIONS}-operation programs over Z_{world.MODULUS}: a base model, then {len(recipe.arms)} "
            "arms: offline phase (TP = 2), answers, GRPO, answers"
        )
        announce(f"logs are in {output}; some minutes")
        outcome = run_and_report(recipe)
    except PearError as error:
        raise SystemExit(f"error: {error}") from error
    draw_weights(outcome, output)
    print_table(outcome)
    print_careful_shares(outcome)
    print(
        f"careful: stretches written step by step, which a small model can follow; the offline data have "
        f"{world.BEHAVIOR_CAREFUL} of them.\n"
        "This world is constructed so that exploration limits RL, which is where PEAR can help: by an earlier\n"
        "take-off, not a higher end. One seed shows the path, not what PEAR is worth: docs/study.md has eight,\n"
        "and every other world that was tried.\n"
        f"pictures, index.html and results.json: {output}   ({(time.monotonic() - started) / 60:.1f} minutes)"
    )


if __name__ == "__main__":
    main()
