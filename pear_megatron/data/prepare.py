"""prepare: validate and tokenise the files of a recipe once, into a cache that every rank maps."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

from pear_megatron.config import PearConfig
from pear_megatron.data.columns import NO_COLUMNS, Columns, needs_behavior_logprobs
from pear_megatron.data.config import DataConfig
from pear_megatron.data.errors import DataError, Problems, RowProblem
from pear_megatron.data.files import expand_files, read_rows
from pear_megatron.data.store import FORMAT_VERSION, TrajectoryDataset, TrajectoryWriter
from pear_megatron.data.tokenizer import load_tokenizer
from pear_megatron.data.validate import Validator
from pear_megatron.progress import reading_progress
from pear_megatron.storage import remove

logger = logging.getLogger(__name__)


class Reading(TypedDict, total=False):
    """What is asked of rows besides the recipe's ``data:`` section.

    Attributes:
        require_behavior_logprobs: False for plain SFT (``pear.variant: none``); True where it is not given.
        columns: what else of the rows is read.
        vocab_size: true (unpadded) size of the model's vocabulary, to check token ids against.
    """

    require_behavior_logprobs: bool
    columns: Columns
    vocab_size: int | None


def reading_of(pear: PearConfig, vocab_size: int) -> Reading:
    """What training with a loss asks for."""
    return {
        "require_behavior_logprobs": needs_behavior_logprobs(pear),
        "columns": Columns.of(pear),
        "vocab_size": vocab_size,
    }


def prepare(config: DataConfig, *, progress: bool = False, **reading: Unpack[Reading]) -> Path:
    """Make the cache of ``config.train``'s files, unless it is there already, and return its folder.

    For one process of a job; the others wait for it and pass the folder to ``TrajectoryDataset.open``.

    Raises:
        DataError: listing what is wrong with the data, by file and line, up to 20 kinds of problems.
        ImportError: ``config.tokenizer`` is set and transformers is missing.
    """
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    validator = Validator(config, tokenizer=tokenizer, **reading)
    place = partial(cache_path, config, **reading, tokenizer_hash=validator.tokenizer_hash)
    folder = place()
    if folder.exists():
        try:
            meta = TrajectoryDataset.open(folder).meta
            _announce(meta["counts"], meta["notes"])
            return folder
        except DataError as error:
            logger.warning("%s; preparing it again", error.problems[0])
            remove(folder)
    files = _files(config)
    try:
        writer = TrajectoryWriter(folder)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: cannot be written to ({error}); set data.cache_dir to a folder that can, and "
            "that every node sees"
        ) from error
    with writer:
        _fill(writer, validator, files, progress)
        if place() != folder:
            raise DataError("data.train: a file changed while it was read; start again when it is written")
        writer.commit(
            {
                "counts": dict(validator.counts),
                "notes": validator.notes,
                "tokenizer_hash": validator.tokenizer_hash,
                "files": [str(file) for file in files],
            }
        )
    _announce(validator.counts, validator.notes)
    return folder


def cache_path(
    config: DataConfig,
    *,
    tokenizer_hash: str | None,
    require_behavior_logprobs: bool = True,
    columns: Columns = NO_COLUMNS,
    vocab_size: int | None = None,
) -> Path:
    """The folder of the cache: its name changes with the files and with all that shapes the content."""
    files = _files(config)
    # the time of a change too: one that archives put back is that of the content
    times = [(file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ctime_ns) for file in files]
    stats = [(str(file), str(file.resolve()), *of) for file, of in zip(files, times, strict=True)]
    content = {
        "format_version": FORMAT_VERSION,
        "files": stats,
        "seq_length": config.seq_length,
        "overlong": config.overlong,
        "truncated": config.truncated,
        "require_behavior_logprobs": require_behavior_logprobs,
        "vocab_size": vocab_size,
        "tokenizer_hash": tokenizer_hash,
        "multi_turn": config.multi_turn,
    }
    if columns != NO_COLUMNS:
        content["columns"] = asdict(columns)
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(config.cache_dir).expanduser() if config.cache_dir else files[0].parent / ".pear_cache"
    return root / key


def _files(config: DataConfig) -> list[Path]:
    problems = Problems()
    files = expand_files(config.train_files, problems)
    problems.raise_if_any()
    return files


def _fill(writer: TrajectoryWriter, validator: Validator, files: list[Path], progress: bool) -> None:
    problems = Problems()
    with reading_progress(files, progress) as advance:
        for file in files:
            for row in read_rows(file, problems, skip=validator.columns.unread):
                try:
                    trajectories = validator(row)
                except RowProblem as problem:
                    problems.add(row.where, problem)
                else:
                    for trajectory in trajectories if not problems.total else ():
                        writer.append(trajectory)
                advance(row.size)
    if not problems.total and not validator.counts["trajectories"]:
        problems.add("data.train", f"no trajectory is left: {_dropped(validator.counts)}")
    problems.raise_if_any()


def describe_split(counts: Mapping[str, int]) -> str:
    """How many rows were split into their turns, and what that costs; empty where none was."""
    if not counts.get("split_rows"):
        return ""
    rows, tokens, whole = (counts[name] for name in ("split_rows", "split_tokens", "split_whole_tokens"))
    return (
        f"{rows:,} {'row was' if rows == 1 else 'rows were'} split into {counts['split_trajectories']:,} trajectories, "
        f"one per assistant turn: {tokens:,} tokens instead of {whole:,} ({tokens / whole:.2f} x)"
    )


def _announce(counts: Mapping[str, int], notes: Mapping[str, int]) -> None:
    counts = Counter(counts)
    if split := describe_split(counts):
        logger.warning("data: %s; see data.multi_turn", split)
    for note, count in notes.items():
        logger.warning("data: %s: %s", note, f"{count:,}")
    if counts["dropped_truncated"] or counts["dropped_overlong"]:
        logger.warning("data: kept %d trajectories; %s", counts["trajectories"], _dropped(counts))
    if counts["half_precision"]:
        logger.warning(
            "data: the behavior_logprobs of %d of %d trajectories look rounded to float16 or bfloat16; their "
            "error is as large as the log ratios they go into: compute and store them in float32",
            counts["half_precision"],
            counts["trajectories"],
        )


def _dropped(counts: Mapping[str, int]) -> str:
    return (
        f"dropped {counts['dropped_truncated']} marked truncated (data.truncated=drop) and "
        f"{counts['dropped_overlong']} longer than data.seq_length (data.overlong=drop)"
    )
