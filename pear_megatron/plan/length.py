"""run_length: how many steps a recipe's data make, and the FLOPs in them."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pear_megatron.plan.flops import training_flops
from pear_megatron.recipe import Recipe


@dataclass(frozen=True)
class RunLength:
    """A run's data and steps.

    Attributes:
        tokens: of one epoch's trajectories, prompts and responses, without padding, as ``validate`` counts them.
        steps_per_epoch: of the first epoch.
        steps: of the run.
        flops: of the run, by the formula in flops.py.
        trajectories, decisions: of one epoch; None where only the number of tokens is known.
    """

    tokens: int
    steps_per_epoch: int
    steps: int
    flops: float
    trajectories: int | None = None
    decisions: int | None = None


def data_is_there(files: Iterable[str]) -> bool:
    """Whether something of every entry of ``data.train`` can be seen from here."""
    paths = [Path(name).expanduser() for name in files]
    return all(path.exists() or glob.glob(str(path), recursive=True) for path in paths)


def length_from_data(recipe: Recipe, *, progress: bool = False) -> RunLength:
    """Counts the data as training will: prepares them into training's own cache, or finds them there."""
    from pear_megatron.data import open_sources, padding_multiple, plan_batches, prepare_sources
    from pear_megatron.data.prepare import reading_of

    data = recipe.data.in_run(recipe.output_dir)
    reading = reading_of(recipe.pear, recipe.model.vocab_size)
    folders = prepare_sources(data, data.train_sources, progress=progress, **reading)
    dataset = open_sources(folders, data.train_sources)
    train = recipe.train
    batches = plan_batches(
        data,
        dataset,
        global_batch_size=train.global_batch_size,
        seed=recipe.seed,
        multiple=padding_multiple(recipe.parallel.context_parallel_size),
    )
    per_epoch = batches.steps_per_epoch()
    steps = train.max_steps or batches.first_step(train.num_epochs)
    epoch = [i for step in range(per_epoch) for row in batches.rows(step)[1] for i in row]
    lengths = np.asarray(dataset.lengths, dtype=np.int64)[epoch]
    # The model sees all tokens of a trajectory but the last.
    flops = training_flops(recipe.model, (lengths - 1).tolist(), frozen=recipe.lora is not None)
    return RunLength(
        tokens=int(lengths.sum()),
        steps_per_epoch=per_epoch,
        steps=steps,
        flops=flops * steps / per_epoch,
        trajectories=len(epoch),
        decisions=int(dataset.num_decisions[epoch].sum()),
    )


def length_from_tokens(recipe: Recipe, tokens: int) -> RunLength:
    """The length of a run on ``tokens`` tokens, if rows of ``data.seq_length`` are full.

    Attention is counted as if a trajectory filled its row: the most that it can take.
    """
    per_epoch = -(-tokens // (recipe.data.seq_length * recipe.train.global_batch_size))
    steps = recipe.train.max_steps or per_epoch * recipe.train.num_epochs
    rows = tokens / recipe.data.seq_length
    row = training_flops(recipe.model, [recipe.data.seq_length], frozen=recipe.lora is not None)
    return RunLength(tokens, per_epoch, steps, flops=row * rows * steps / per_epoch)
