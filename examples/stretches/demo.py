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
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from examples.launch import REPOSITORY, announce
from examples.stretches import plots, weigh, world
from pear_megatron import PearConfig
from pear_megatron.compare.outcome import Outcome
from pear_megatron.compare.page import page
from pear_megatron.compare.recipe import load_compare_recipe
from pear_megatron.compare.report import print_table, run_and_report
from pear_megatron.errors import PearError
from pear_megatron.evaluate.statistics import interval
from pear_megatron.pages.figures import in_both_widths, write_png
from pear_megatron.pages.page import Section
from pear_megatron.storage import write_atomically

RECIPE = REPOSITORY / "recipes" / "compare" / "demo.yaml"
_TRAJECTORIES = 512  # whose weights are drawn


def weights_section(outcome: Outcome, output: Path) -> Section:
    """PEAR's weights of real offline trajectories as each arm sees them at the end of its offline phase.

    Writes the pictures into ``output`` as well.
    """
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
    over_positions = partial(
        plots.weights_over_positions,
        {arm: w[chosen] for arm, w in weights.items()},
        careful[chosen],
        stretch_length=world.STRETCH_LENGTH,
        names=[_many(int(count)) for count in careful[chosen].sum(axis=1)],
    )
    in_careful = np.repeat(careful, world.STRETCH_LENGTH, axis=1)
    in_careful = np.pad(in_careful, ((0, 0), (0, world.RESPONSE_LENGTH - in_careful.shape[1])))
    distributions = partial(plots.weight_distributions, weights, careful=in_careful)
    write_png(over_positions(), output / "weights_over_positions.png")
    write_png(distributions(), output / "weight_distributions.png")
    captions = ("Three answers, decision by decision", f"{len(careful):,} answers")
    drawn = (over_positions, distributions)
    return Section(
        "What PEAR weighs",
        [
            "The weights of offline answers under each arm's model at the end of its offline phase. A weight is the "
            "product of the clipped ratios of what follows, so a decision counts the more, the better the model can "
            "go on from it as the writer did: much before careful stretches, little before coarse ones.",
        ],
        pictures=[
            (caption, in_both_widths(lambda narrow, draw=draw: draw(narrow=narrow), caption))
            for caption, draw in zip(captions, drawn, strict=True)
        ],
    )


def _many(careful: int) -> str:
    return f"{careful or 'no'} careful stretch{'' if careful == 1 else 'es'}"


def careful_section(outcome: Outcome) -> Section:
    """How often each checkpoint writes what RL could reinforce."""
    rows = []
    for arm in outcome.recipe.arms:
        cells = []
        for when in ("before", "after"):
            estimate = interval(
                weigh.careful_shares(outcome.of(arm)[0].cell.folder / when), bounds=(0.0, 1.0)
            )
            cells.append(f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]")
        rows.append((arm, cells))
    return Section(
        "Careful stretches in held-out answers",
        [
            "The share of stretches that are careful, 95 % intervals over problems. Only these can be reinforced."
        ],
        ("before RL", "after RL"),
        rows,
    )


def world_section() -> Section:
    """What the world is, and what can be learnt from it."""
    return Section(
        "The world",
        [
            f"A problem is a program of {world.NUM_OPERATIONS} operations on the numbers 0 to {world.MODULUS - 1} "
            f"and a number to start from. An answer gives one symbol per operation, in {world.NUM_STRETCHES} "
            f"stretches of {world.STRETCH_LENGTH}. In a careful stretch each symbol is the value so far, so a small "
            "model can compute the next one. In a coarse stretch all but the last are remainders mod "
            f"{world.RESIDUES}: the last one needs {world.STRETCH_LENGTH} operations at once, which this model "
            "cannot do.",
            f"The teacher that wrote the offline data never errs, and writes {world.BEHAVIOR_CAREFUL:.0%} of its "
            "stretches carefully. RL rewards an answer whose values at the ends of all stretches are right, so only "
            "careful answers can earn a reward, and RL has to find them first. Plain SFT copies the teacher's "
            "share; PEAR gives more weight to what the model can follow.",
            "The world is built so that exploration limits RL, which is where PEAR can help: by an earlier "
            "take-off, not by a higher end. docs/study.md has eight seeds, and every other world that was tried.",
        ],
    )


def print_table_of(section: Section) -> None:
    """A section's table on the terminal."""
    table = Table("arm", title=section.title)
    for column in section.columns:
        table.add_column(column, justify="right")
    for name, cells in section.rows:
        table.add_row(name, *cells)
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
            f"{world.NUM_OPERATIONS}-operation programs over Z_{world.MODULUS}: a base model, then "
            f"{len(recipe.arms)} arms: offline phase (TP = 2), answers, GRPO, answers"
        )
        announce(f"logs are in {output}; some minutes")
        outcome = run_and_report(recipe)
    except PearError as error:
        raise SystemExit(f"error: {error}") from error
    careful, weights = careful_section(outcome), weights_section(outcome, output)
    write_atomically(output / "index.html", page(outcome, first=[world_section()], last=[careful, weights]))
    print_table(outcome)
    print_table_of(careful)
    print(
        "careful: stretches written step by step, which a small model can follow; the offline data have "
        f"{world.BEHAVIOR_CAREFUL} of them.\nThis world is constructed so that exploration limits RL, which is where "
        "PEAR can help: by an earlier\ntake-off, not a higher end. One seed shows the path, not what PEAR is worth: "
        f"docs/study.md has eight,\nand every other world that was tried.\nopen {output / 'index.html'} in a "
        f"browser; pictures and results.json are beside it   ({(time.monotonic() - started) / 60:.1f} minutes)"
    )


if __name__ == "__main__":
    main()
