"""Entry point: python -m pear_megatron.train --nproc-per-node N --config RECIPE.yaml [key=value ...]

Or torchrun --nproc-per-node N -m pear_megatron.train ..., which several nodes need.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pear_megatron.errors import PearError, of_the_system
from pear_megatron.interrupt import EXIT_INTERRUPTED
from pear_megatron.ranks import (
    check_same_on_every_rank,
    check_shared,
    end_with_parent,
    from_main,
    is_main,
    of_another_rank,
    report_error,
    run_ranks,
)
from pear_megatron.recipe import RecipeError, check_layout, load_recipe
from pear_megatron.storage import PATIENCE, lock
from pear_megatron.streams import log_lines, steady
from pear_megatron.train.stop import EXIT_REQUEUE, StopRequest, remove_requeue_file
from pear_megatron.train.weights_and_biases import check_wandb
from pear_megatron.watch import working

_EXAMPLE = """\
example:
  torchrun --nproc-per-node 2 -m pear_megatron.train --config recipes/sft/tiny.yaml \\
      data.train=trajectories.jsonl output_dir=results/tiny \\
      parallel.tensor_model_parallel_size=2 train.max_steps=100

On one machine, python -m pear_megatron.train --nproc-per-node 2 ... does the same without torchrun's reports, and
with the run's exit code.
SIGTERM or SIGUSR1 to any of its processes, or Ctrl-C: the run saves, leaves output_dir/requeue and ends with exit
code 75; the same command goes on (docs/checkpoints.md).
"""

# Folders that a node may have a copy of; the weights in it are compared when they are loaded.
_MAY_DIFFER = ("model.hf", "data.tokenizer")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """--config and Hydra-style overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m pear_megatron.train",
        description="PEAR (or plain SFT, with pear.variant=none) on Megatron-Core.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="the recipe")
    parser.add_argument(
        "--nproc-per-node",
        type=_positive,
        default=1,
        metavar="N",
        help="ranks to start here, where torchrun does not",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe's keys")
    for argument in sys.argv[1:] if arguments is None else arguments:
        key, equals, _ = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and equals and key not in ("config", "nproc-per-node"):
            parser.error(f"{argument} is no option; keys of the recipe have no dashes: {argument[2:]}")
    return parser.parse_intermixed_args(arguments)


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number of ranks; give 1 or more")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    """Trains; errors of the user's making are printed by rank 0 alone and end with exit code 1.

    A run that was asked to stop ends with EXIT_REQUEUE.
    """
    args = parse_arguments(arguments)
    steady()
    end_with_parent()
    world = os.environ.get("WORLD_SIZE")
    if args.nproc_per_node > 1 and world is None:
        sys.exit(run_ranks(args.nproc_per_node, "pear_megatron.train", arguments or sys.argv[1:]))
    other = args.nproc_per_node > 1 and str(args.nproc_per_node) != world
    if world is not None and (other or (world != "1" and "RANK" not in os.environ)):
        asked = f"--nproc-per-node {args.nproc_per_node}" if other else "no RANK"
        sys.exit(
            f"error: WORLD_SIZE={world} is in the environment, as torchrun sets it for a rank that it has started, "
            f"beside {asked}; unset WORLD_SIZE, or start the ranks with torchrun"
        )
    stop = StopRequest()
    stop.install()
    log_lines(logging.INFO if is_main() else logging.ERROR)
    try:
        with working("training: starting"):
            finished = _run(args, stop)
    except (PearError, ImportError) as error:
        report_error(error)
        sys.exit(1)
    except Exception as error:
        if stop.interrupted:
            os._exit(EXIT_INTERRUPTED)  # another rank has ended at once: no news
        if (told := of_another_rank(error)) is None:
            raise
        report_error(told)
        sys.exit(1)
    stop.ignore()
    if not finished:
        sys.exit(EXIT_REQUEUE)


def _run(args: argparse.Namespace, stop: StopRequest) -> bool:
    # Megatron-Core takes seconds to import: a mistake in the recipe is said before that.
    recipe = load_recipe(args.config, args.overrides)
    check_wandb(recipe)
    if is_main():
        remove_requeue_file(recipe.output_dir)
    check_layout(
        recipe.model,
        recipe.parallel,
        recipe.train,
        int(os.environ.get("WORLD_SIZE", "1")),
        seq_length=recipe.data.seq_length,
    )

    from pear_megatron.megatron import layout as layouts
    from pear_megatron.megatron.checkpoint.state import versions
    from pear_megatron.train.trainer import Trainer

    threading.excepthook = _say_of_thread
    try:
        try:
            layouts.join()
            settings = {**recipe.model_dump(mode="json"), "versions": versions()}
            check_same_on_every_rank(settings, may_differ=_MAY_DIFFER)
            layout = layouts.initialize(recipe.model, recipe.parallel, recipe.train)
            with ExitStack() as held:
                from_main(partial(_hold, held, recipe.output_dir))
                check_shared(Path(recipe.output_dir), "output_dir")
                return Trainer(recipe, layout, stop).train()
        finally:
            layouts.shutdown()
    except Exception as error:
        if not isinstance(error, PearError) and (told := of_the_system(error, recipe.output_dir)):
            raise told from error
        raise


def _say_of_thread(of: threading.ExceptHookArgs) -> None:
    """A thread's traceback; of TensorBoard's, which finds the disk full, RunFolder speaks."""
    if of.exc_value is None or not of_the_system(of.exc_value, None):
        threading.__excepthook__(of)


def _hold(held: ExitStack, output_dir: str) -> None:
    """Makes the folder this run's own, for as long as it takes."""
    try:
        held.enter_context(lock(Path(output_dir), "run", other="output_dir", patience=PATIENCE))
    except OSError as error:
        raise RecipeError(f"output_dir {output_dir} cannot be made or written to: {error}") from error


if __name__ == "__main__":
    main()
