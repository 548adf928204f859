"""open_dataset, open_validation: the run's trajectories, prepared by one rank and mapped by all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pear_megatron.data import AnyDataset, DataSource, as_sources, prepare_everywhere
from pear_megatron.data.columns import REFERENCE
from pear_megatron.data.errors import DataError
from pear_megatron.data.options import in_options
from pear_megatron.data.prepare import reading_of
from pear_megatron.ranks import is_main
from pear_megatron.recipe import Recipe

log = logging.getLogger("pear_megatron")

_LOOKED_AT = 100  # of the held-out trajectories
_MOST_CANDIDATES = 200  # of the trained ones that are as long as one of them


def open_dataset(recipe: Recipe) -> AnyDataset:
    """Prepares ``data.train`` on rank 0 and opens it on every rank; an error there is an error everywhere.

    Raises:
        DataError: what is wrong with the data, file and line; or every reward is 0.
    """
    dataset = _open(recipe, recipe.data.train_sources)
    if not dataset.rewards.any():
        raise DataError(
            f"{', '.join(dataset.meta['files'][:3])}: every trajectory has reward 0, so that nothing would be "
            "trained; leave `reward` out (1 is the default), or grade the rows"
        )
    return dataset


def open_validation(recipe: Recipe, train: AnyDataset) -> AnyDataset | None:
    """The same of ``data.validation``; None where it is not given. Warns of files that ``train`` has too.

    Raises:
        DataError: what is wrong with the data, file and line.
    """
    if recipe.data.validation is None:
        return None
    sources = as_sources(recipe.data.validation)
    with in_options({"data.train": "data.validation"}):
        held_out = _open(recipe, sources)
    if train.has(REFERENCE) != held_out.has(REFERENCE):
        has, lacks = ("train", "validation") if train.has(REFERENCE) else ("validation", "train")
        raise DataError(
            f"data.{lacks}: the rows have no {REFERENCE} and those of data.{has} have it, so pear.negative_floor "
            "would mean two things; write it with `pear-megatron score --as reference`, or take it out of both"
        )
    trained = {Path(file).resolve() for file in train.meta["files"]}
    shared = [file for file in held_out.meta["files"] if Path(file).resolve() in trained]
    for file in shared:
        log.warning(
            "data.validation: %s is in data.train too; evaluations on it say how well it is learnt", file
        )
    if not shared:
        _warn_of_shared(train, held_out)
    return held_out


def _warn_of_shared(train: AnyDataset, held_out: AnyDataset) -> None:
    """Says how many held-out trajectories are trained on as well, token for token; looks at a hundred of them."""
    looked_at = np.unique(np.linspace(0, len(held_out) - 1, _LOOKED_AT).astype(int)) if is_main() else ()
    shared = 0
    for i in looked_at:
        alike = (train.lengths == held_out.lengths[i]) & (train.num_decisions == held_out.num_decisions[i])
        ids = held_out[int(i)].input_ids
        candidates = np.flatnonzero(alike)[:_MOST_CANDIDATES]
        shared += any(np.array_equal(train[int(k)].input_ids, ids) for k in candidates)
    if shared:
        log.warning(
            "data.validation: %d of the %d held-out trajectories that were looked at are in data.train too; "
            "evaluations on them say how well they are learnt",
            shared,
            len(looked_at),
        )


def _open(recipe: Recipe, sources: Sequence[DataSource]) -> AnyDataset:
    reading = reading_of(recipe.pear, recipe.model.vocab_size)
    return prepare_everywhere(recipe.data.in_run(recipe.output_dir), sources, **reading)
