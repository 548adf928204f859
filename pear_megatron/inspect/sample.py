"""Which trajectories are looked at, and the policy's log-probs of their tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pear_megatron.data import DataConfig, DataError, Trajectory, open_sources, prepare_sources
from pear_megatron.data.columns import Columns
from pear_megatron.data.errors import Problems, RowProblem
from pear_megatron.data.fields import get_nullable_floats
from pear_megatron.data.files import read_rows

_FIELD = "policy_logprobs"
# The top k of a KL is not looked at here: no weight comes from it.
_COLUMNS = Columns(reference_logprobs="if_there")
_SCORED_AT_A_TIME = 32  # trajectories between two moves of the progress bar


@dataclass(frozen=True)
class Sample:
    """Trajectories of a data set, and what is known of the whole of it.

    Attributes:
        trajectories: those that are looked at, in the data's order.
        files: what the data came from.
        counts: what ``prepare`` counted: ``trajectories``, ``dropped_truncated``, ``half_precision``, ...
        lengths: int64 [N], tokens of every trajectory of the data.
        num_decisions: int64 [N].
        rewards: float32 [N].
        seed: of the choice.
    """

    trajectories: list[Trajectory]
    files: list[str]
    counts: dict[str, int]
    lengths: np.ndarray
    num_decisions: np.ndarray
    rewards: np.ndarray
    seed: int


def draw(
    config: DataConfig,
    *,
    require_behavior_logprobs: bool,
    vocab_size: int | None,
    max_trajectories: int,
    seed: int,
    progress: bool,
) -> Sample:
    """Checks the data as training does and draws trajectories, each equally likely, whatever its source."""
    with tempfile.TemporaryDirectory(prefix="pear-inspect-") as folder:
        prepared = prepare_sources(
            config.model_copy(update={"cache_dir": folder}),
            config.train_sources,
            require_behavior_logprobs=require_behavior_logprobs,
            columns=_COLUMNS,
            vocab_size=vocab_size,
            progress=progress,
        )
        dataset = open_sources(prepared, config.train_sources)
        chosen = np.arange(len(dataset))
        if len(dataset) > max_trajectories:
            generator = np.random.Generator(np.random.PCG64(seed))
            chosen = np.sort(generator.choice(len(dataset), max_trajectories, replace=False))
        return Sample(
            trajectories=[_in_memory(dataset[int(i)]) for i in chosen],
            files=dataset.meta["files"],
            counts=dataset.meta["counts"],
            lengths=np.array(dataset.lengths),
            num_decisions=np.array(dataset.num_decisions),
            rewards=np.array(dataset.rewards),
            seed=seed,
        )


def _in_memory(trajectory: Trajectory) -> Trajectory:
    """Free of the files that are mapped behind it."""
    arrays = {name: value for name, value in vars(trajectory).items() if isinstance(value, np.ndarray)}
    copies: dict[str, Any] = {name: np.array(array) for name, array in arrays.items()}
    return replace(trajectory, **copies)


def read_policy_logprobs(sample: Sample) -> list[np.ndarray]:
    """The column ``policy_logprobs`` of the sample's rows, a float32 [n] each, aligned with ``input_ids``."""
    place = {trajectory.id: i for i, trajectory in enumerate(sample.trajectories)}
    if len(place) < len(sample.trajectories):
        raise DataError(
            f"two sources have rows of the same id: {_FIELD} cannot be told apart; make ids unique"
        )
    found: dict[int, np.ndarray] = {}
    problems = Problems()
    for file in sample.files:
        for row in read_rows(Path(file), problems, skip=_COLUMNS.unread):
            i = place.get(str(row.fields.get("id", row.where)))
            if i is None:
                continue
            try:
                found[i] = _policy_logprobs(row.fields, sample.trajectories[i].loss_mask)
            except RowProblem as problem:
                problems.add(row.where, problem)
    for name, i in place.items() if not problems.total else ():
        if i not in found:
            problems.add(
                name,
                f"its row is split into turns, and --scored needs {_FIELD} for each of them: write them with "
                "`pear-megatron score --as policy`, or give the policy itself: --model DIR",
            )
    problems.raise_if_any()
    return [found[i] for i in range(len(place))]


def _policy_logprobs(fields: dict[str, Any], mask: np.ndarray) -> np.ndarray:
    if _FIELD not in fields:
        raise RowProblem(
            f"missing field {_FIELD!r}: --scored reads the policy's log-probs from it; write it with "
            "`pear-megatron score --as policy`, or give the policy itself: --model DIR"
        )
    values, nulls = get_nullable_floats(fields, _FIELD)
    bad = np.flatnonzero(mask & ~(np.isfinite(values) & ~nulls & (values <= 1e-5)))
    if len(bad):
        raise RowProblem(
            f"{_FIELD}[{bad[0]}] = {values[bad[0]]} on a decision is no log-probability; write the field again "
            "with `pear-megatron score --as policy`"
        )
    return np.where(mask, np.minimum(values, 0.0), 0.0).astype(np.float32)


def score(model: str, trajectories: Sequence[Trajectory], *, dtype: str | None) -> list[np.ndarray]:
    """The log-probs that a model gives the trajectories' decisions, a float32 [n] each; shows its progress."""
    from pear_megatron.progress import token_progress
    from pear_megatron.score.backends import load_scorer
    from pear_megatron.score.ranks import Ranks

    scored: list[np.ndarray] = []
    tokens = sum(len(t.input_ids) for t in trajectories)
    with Ranks(), token_progress(tokens, replicas=1, show=True) as advance:
        scorer = load_scorer(model, dtype=dtype)
        for start in range(0, len(trajectories), _SCORED_AT_A_TIME):
            part = trajectories[start : start + _SCORED_AT_A_TIME]
            scored += scorer(part)[0]
            advance(sum(len(t.input_ids) for t in part))
    return scored
