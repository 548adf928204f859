"""generate_rollout: offline trajectories as slime's samples."""

from __future__ import annotations

import argparse
import logging
from functools import lru_cache
from typing import Any

import numpy as np

from pear_megatron.adapters.offline_data import open_trajectories
from pear_megatron.adapters.slime.settings import (
    SlimeSettings,
    check_data_arguments,
    check_loss_arguments,
    settings,
)
from pear_megatron.data import DataConfig, TrajectoryDataset
from pear_megatron.data.columns import REFERENCE, Columns, needs_behavior_logprobs
from pear_megatron.data.options import in_options
from pear_megatron.errors import RecipeError

log = logging.getLogger("pear_megatron")


def generate_rollout(
    args: argparse.Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> list[list[Any]]:
    """``--rollout-function-path``: the trajectories of a rollout as slime's ``Sample``s, a group of one each.

    Which ones depends on --rollout-seed and the rollout's number alone, so a resumed run goes on where it was. Every
    epoch is a new order; an epoch's end may fall into a rollout.

    Args:
        args: slime's arguments.
        rollout_id: from 0.
        data_source: slime's, not used.
        evaluation: slime evaluates by generating; refused.

    Raises:
        RecipeError: bad settings; arguments under which slime would lose trajectories or change the loss.
        DataError: what is wrong with the files, by file and line; trajectories that are too long.
    """
    if evaluation:
        raise RecipeError(
            "offline trajectories cannot be generated for an evaluation; leave --eval-interval out"
        )
    from slime.utils.types import Sample

    return [[Sample(status=Sample.Status.COMPLETED, **sample)] for sample in samples(args, rollout_id)]


def samples(args: argparse.Namespace, rollout_id: int) -> list[dict[str, Any]]:
    """The fields of a rollout's samples; see ``generate_rollout``."""
    config = settings(args)
    check_data_arguments(args)
    check_loss_arguments(args)
    size, known = args.rollout_batch_size, len(_opened)
    dataset = _dataset(config, *_length_limit(args), args.vocab_size)
    if len(_opened) > known:
        epochs = (args.num_rollout or 0) * size / len(dataset)
        log.warning("PEAR: an epoch is %.4g rollouts; %.4g epochs are asked for", len(dataset) / size, epochs)
    places = range(rollout_id * size, (rollout_id + 1) * size)
    return [_sample(dataset, place, args.rollout_seed) for place in places]


def _sample(dataset: TrajectoryDataset, place: int, seed: int) -> dict[str, Any]:
    """The trajectory at a place of the endless order, shifted by nobody: entry i of all is response token i's."""
    epoch, within = divmod(place, len(dataset))
    trajectory = dataset[int(_order(len(dataset), seed, epoch)[within])]
    prompt = int(trajectory.loss_mask.argmax())  # at least 1: token 0 is no decision
    return {
        "index": place,
        "group_index": place,
        "tokens": trajectory.input_ids.tolist(),
        "response_length": len(trajectory.input_ids) - prompt,
        "loss_mask": trajectory.loss_mask[prompt:].astype(int).tolist(),
        "rollout_log_probs": trajectory.behavior_logprobs[prompt:].tolist(),
        "reward": trajectory.reward,
        "metadata": {"id": trajectory.id},
    }


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def _length_limit(args: argparse.Namespace) -> tuple[int, str]:
    """Tokens that a trajectory may have, and the options that say so."""
    if args.use_dynamic_batch_size:
        return (
            args.max_tokens_per_gpu * args.context_parallel_size,
            "--max-tokens-per-gpu x --context-parallel-size",
        )
    return args.seq_length, "--seq-length"


_opened: dict[tuple[Any, ...], TrajectoryDataset] = {}


def _dataset(config: SlimeSettings, tokens: int, option: str, vocab_size: int) -> TrajectoryDataset:
    if config.data is None:
        raise RecipeError(
            "pear_data is missing in the YAML file of --custom-config-path; name the scored trajectories"
        )
    data = DataConfig(
        train=config.data,
        seq_length=tokens - 1,  # a trajectory of n tokens takes n - 1 positions, and n of slime's
        tokenizer=config.tokenizer,
        cache_dir=config.data_cache,
    )
    needs_logprobs, columns = needs_behavior_logprobs(config), Columns.of(config)
    key = (data.model_dump_json(), needs_logprobs, columns, vocab_size)
    if key not in _opened:
        names = {"data.seq_length": option, "data.train": "pear_data", "data.tokenizer": "pear_tokenizer"}
        with in_options(names):
            dataset = open_trajectories(
                data, needs_logprobs=needs_logprobs, vocab_size=vocab_size, columns=columns
            )
        for column in ("token_weights", REFERENCE):
            if dataset.has(column):
                raise RecipeError(
                    f"pear_data {config.data}: rows have {column}, and slime carries no number of the kind from a "
                    "sample to the loss; leave the field out, or train in another loop"
                )
        _opened[key] = dataset
    return _opened[key]
