"""Training runs on ranks forked from one server: several layouts in a launch, seconds each."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.distributed import run_ranks
from tests.megatron.runs import TINY, metrics

# A model small enough to train in milliseconds that every layout of four ranks can split.
SMALL = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.vocab_size=1000",
    "train.max_steps=4",
    "optimizer.adam_eps=1e-6",  # with less, Adam makes updates of the rounding of gradients that are near zero
]


def be_quiet() -> None:
    """Forked ranks have pytest's standard error and none of its capturing of logs."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def train_once(overrides: list[str]) -> bool | str:
    """One run on this rank -> whether it finished, or the error it ended with."""
    from megatron.core import parallel_state

    from pear_megatron.errors import PearError
    from pear_megatron.megatron.layout import initialize
    from pear_megatron.recipe import load_recipe
    from pear_megatron.train.trainer import Trainer

    try:
        recipe = load_recipe(TINY, overrides)
        layout = initialize(recipe.model, recipe.parallel, recipe.train)
        return Trainer(recipe, layout).train()
    except PearError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        parallel_state.destroy_model_parallel()


def rank_train(rank: int, runs: list[list[str]]) -> list[bool | str]:
    from pear_megatron.megatron import cpu

    cpu.enable()
    be_quiet()
    return [train_once(overrides) for overrides in runs]


def train_runs(world: int, data: Path, runs: dict[Path, list[str]]) -> dict[Path, list[dict[str, Any]]]:
    """Trains each run on ``world`` ranks, one after the other -> its metrics."""
    overrides = [
        [f"data.train={data}", f"output_dir={folder}", *SMALL, *extra] for folder, extra in runs.items()
    ]
    for outcomes in run_ranks(world, rank_train, overrides):
        assert outcomes == [True] * len(runs), outcomes
    return {folder: metrics(folder) for folder in runs}


def failures(world: int, data: Path, folder: Path, *extra: str) -> list[str]:
    """The error that each rank ends with."""
    overrides = [f"data.train={data}", f"output_dir={folder}", *SMALL, *extra]
    outcomes = [outcome for (outcome,) in run_ranks(world, rank_train, [overrides])]
    assert all(isinstance(outcome, str) for outcome in outcomes), outcomes
    return outcomes


def rank_weights(rank: int, folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    from megatron.core import parallel_state

    from pear_megatron.megatron.checkpoint.load_model import load_run

    be_quiet()
    weights = []
    for folder in folders:
        model, _ = load_run(folder)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        parallel_state.destroy_model_parallel()
    return weights


def final_weights(*folders: Path) -> list[dict[str, torch.Tensor]]:
    """Every parameter of the runs' newest checkpoints, whole, on one rank."""
    return run_ranks(1, rank_weights, list(folders))[0]
