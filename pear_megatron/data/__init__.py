"""Offline trajectories, from JSONL and Parquet files to the micro-batches of a training step.

files -> validate (fields, chat, tokenizer) -> store, tied together by prepare; then packing -> loader ->
batches.
"""

from typing import TYPE_CHECKING

from pear_megatron.data.blend import AnyDataset, TrajectoryBlend
from pear_megatron.data.config import DataConfig, DataSource, as_sources
from pear_megatron.data.errors import DataError
from pear_megatron.data.packing import BatchPlan, padding_multiple, plan_epoch
from pear_megatron.data.prepare import cache_path, prepare
from pear_megatron.data.sources import (
    open_sources,
    plan_batches,
    prepare_everywhere,
    prepare_sources,
    require_files,
)
from pear_megatron.data.store import TrajectoryDataset
from pear_megatron.data.tokenizer import load_tokenizer, tokenizer_hash
from pear_megatron.data.trajectory import Trajectory
from pear_megatron.lazy import lazily

if TYPE_CHECKING:
    from pear_megatron.data.batches import PackedBatch, collate
    from pear_megatron.data.loader import micro_batches, num_micro_batches
else:  # these need torch
    _NAMES = {"batches": ["PackedBatch", "collate"], "loader": ["micro_batches", "num_micro_batches"]}
    __getattr__, __dir__ = lazily(__name__, _NAMES)

__all__ = [
    "AnyDataset",
    "BatchPlan",
    "DataConfig",
    "DataError",
    "DataSource",
    "PackedBatch",
    "Trajectory",
    "TrajectoryBlend",
    "TrajectoryDataset",
    "as_sources",
    "cache_path",
    "collate",
    "load_tokenizer",
    "micro_batches",
    "num_micro_batches",
    "open_sources",
    "padding_multiple",
    "plan_batches",
    "plan_epoch",
    "prepare",
    "prepare_everywhere",
    "prepare_sources",
    "require_files",
    "tokenizer_hash",
]
