"""`make demo`: plain SFT against PEAR on real Megatron-Core, two tensor-parallel processes, no GPU.

One base model; from it plain SFT, PEAR token and PEAR sequence on the same offline trajectories, whose
behaviour log-probs are exact; then held-out answers of each. Writes DIR/results.json and three pictures.
The world is constructed to show what PEAR is for: see examples/stretches/world.py.

Continues where it stopped: finished steps are kept, so run it again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from examples.launch import RECIPES, announce, run, train
from examples.stretches import world
from examples.stretches.estimates import Estimate, bootstrap_interval, score_answers
from examples.stretches.make_data import make_data

ARMS = {"SFT": "none", "PEAR token": "token", "PEAR sequence": "sequence"}
BASE_RECIPE = RECIPES / "stretches_base.yaml"
ARM_RECIPE = RECIPES / "stretches.yaml"


def arm_folder(output: Path, arm: str) -> Path:
    """Where an arm's run lives."""
    return output / arm.lower().replace(" ", "_")


def train_everything(output: Path, seed: int) -> None:
    """The base model and an arm per loss, from the same checkpoint on the same data."""
    data = output / "data"
    announce(f"data: {world.NUM_OPERATIONS}-operation programs over Z_{world.MODULUS}, with exact log-probs")
    if not all((data / f"{name}.jsonl").exists() for name in ("base", "offline", "heldout")):
        make_data(data, seed=seed, num_base=25_600, num_offline=3_000, num_heldout=300)

    announce("base model: 400 steps on careful answers, TP = 2")
    if not (output / "initial" / "config.yaml").exists():
        policy = ["-m", "examples.stretches.policy", "init", "--recipe", str(BASE_RECIPE)]
        run([*policy, "--output", str(output / "initial")], output / "initial.log")
    base = [
        f"checkpoint.pretrained={output / 'initial'}",
        f"data.train={data / 'base.jsonl'}",
        f"seed={seed}",
    ]
    train(BASE_RECIPE, output / "base", base)
    for arm, variant in ARMS.items():
        announce(f"{arm}: 4 epochs over 3000 offline trajectories (pear.variant={variant}), TP = 2")
        overrides = [f"checkpoint.pretrained={output / 'base'}", f"data.train={data / 'offline.jsonl'}"]
        train(ARM_RECIPE, arm_folder(output, arm), [*overrides, f"pear.variant={variant}", f"seed={seed}"])


def evaluate(output: Path, samples: int) -> dict[str, dict[str, Estimate]]:
    """Held-out answers of the base and of each arm -> measure -> estimate."""
    results: dict[str, dict[str, Estimate]] = {}
    for name, folder in {"base": output / "base", **{arm: arm_folder(output, arm) for arm in ARMS}}.items():
        announce(f"{name}: {samples} answers at temperature 1 to each of 300 held-out problems")
        answers = folder / "answers.npz"
        if not answers.exists():
            policy = ["-m", "examples.stretches.policy", "answer", "--run", str(folder)]
            problems = ["--problems", str(output / "data" / "heldout.jsonl"), "--samples", str(samples)]
            run([*policy, *problems, "--output", str(answers)], output / f"{folder.name}_answers.log")
        stored = np.load(answers)
        scores = score_answers(stored["prompts"], stored["responses"])
        results[name] = {measure: bootstrap_interval(values) for measure, values in scores.items()}
    return results


def weigh_trajectories(output: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """PEAR's weights of real offline trajectories as each arm sees them at its end: arm -> [N, 33]."""
    from pear_megatron import PearConfig, importance_weights
    from pear_megatron.recipe import load_recipe

    weights = {}
    for arm, variant in ARMS.items():
        if variant == "none":
            continue
        folder = arm_folder(output, arm)
        scores = folder / "scores.npz"
        if not scores.exists():
            policy = ["-m", "examples.stretches.policy", "score", "--run", str(folder)]
            trajectories = ["--trajectories", str(output / "data" / "offline.jsonl")]
            run([*policy, *trajectories, "--output", str(scores)], output / f"{folder.name}_scores.log")
        stored = np.load(scores)
        count, length = stored["logprobs"].shape
        config = load_recipe(ARM_RECIPE, [f"pear.variant={variant}"]).pear
        assert isinstance(config, PearConfig)
        flat, _ = importance_weights(
            torch.from_numpy(stored["logprobs"]).flatten(),
            torch.from_numpy(stored["behavior_logprobs"]).flatten(),
            torch.ones(count * length, dtype=torch.bool),
            torch.arange(0, count * length + 1, length),
            config,
        )
        weights[arm] = flat.view(count, length).numpy()
        careful = world.careful_stretches(stored["responses"])
    return weights, careful


def draw(output: Path, results: dict[str, dict[str, Estimate]]) -> None:
    """The three pictures."""
    from examples.stretches import plots

    weights, careful = weigh_trajectories(output)
    # The trajectories with the most careful stretches, and some with none: where the weights differ.
    order = np.argsort(-careful.sum(axis=1), kind="stable")
    chosen = [*order[:2], *order[-1:]]
    plots.plot_weights_over_positions(
        output / "weights_over_positions.png",
        {arm: w[chosen] for arm, w in weights.items()},
        careful[chosen],
        stretch_length=world.STRETCH_LENGTH,
    )
    plots.plot_weight_distributions(output / "weight_distributions.png", weights)
    plots.plot_results(output / "results.png", {arm: results[arm] for arm in ARMS})


def report(output: Path, results: dict[str, dict[str, Estimate]], seconds: float) -> None:
    """The table, and results.json."""
    measures = list(next(iter(results.values())))
    table = Table(title="300 held-out problems, 8 answers each, 95 % intervals over problems")
    table.add_column("arm")
    for measure in measures:
        table.add_column(measure.replace("_", " "), justify="right")
    for arm, estimates in results.items():
        table.add_row(arm, *(f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in estimates.values()))
    Console(highlight=False, width=110).print(table)
    rows = {
        arm: {m: {"mean": e.mean, "low": e.low, "high": e.high} for m, e in estimates.items()}
        for arm, estimates in results.items()
    }
    partial = output / ".results.json.partial"
    partial.write_text(json.dumps(rows, indent=2) + "\n")
    os.replace(partial, output / "results.json")
    print(
        "careful share: stretches written step by step, which a small model can follow. The offline data have "
        "0.12 of them.\n"
        "This world is constructed: its answers are limited by exploration, which is where PEAR helps. Before RL\n"
        "the arms barely differ in pass@1; what PEAR changes is how often the checkpoint writes what RL can\n"
        "reinforce. The GRPO phase is not part of this demo yet.\n"
        f"pictures and results.json: {output}   ({seconds / 60:.1f} minutes)"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/demo"), metavar="DIR")
    parser.add_argument("--samples", type=int, default=8, help="answers per held-out problem (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order (default: 0)")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    started = time.monotonic()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    train_everything(output, args.seed)
    results = evaluate(output, args.samples)
    announce("weights of real trajectories, and pictures")
    draw(output, results)
    report(output, results, time.monotonic() - started)


if __name__ == "__main__":
    main()
