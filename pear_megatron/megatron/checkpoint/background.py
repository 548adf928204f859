"""What is adapted of mcore's writing in the background, on both versions: its results, and rank 0's errors."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import tempfile
from pathlib import Path
from typing import Any


def saving_strategy(errors: list[BaseException]) -> Any:
    """mcore's strategy for saving shards in the background, shared out over the data-parallel ranks.

    Rank 0 writes the index of the shards while the others wait for its word. An error there is put into
    ``errors`` and the word is given, for ``CheckpointFolder.commit`` to tell everybody.
    """
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    # 0.19 advises every rank to take a package instead that older versions do not know.
    logging.getLogger(TorchDistSaveShardedStrategy.__module__).setLevel(logging.ERROR)

    class Strategy(TorchDistSaveShardedStrategy):
        def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
            finish = writer.finish

            def finish_or_remember(*results: Any) -> None:
                try:
                    finish(*results)
                except OSError as error:
                    errors.append(error)

            writer.finish = finish_or_remember
            return super()._get_save_and_finalize_callbacks(writer, *args)

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(Strategy("torch_dist", 1), group)


def bytes_to_write(state: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes: of shards that several ranks hold, the main one counts."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    return sum(
        shard.data.nbytes
        for shard in nested_values(state)
        if isinstance(shard, ShardedTensor | ShardedTensorFactory)
        and shard.data is not None
        and is_main_replica(shard.replica_id)
    )


def first_cause(error: BaseException) -> str:
    """An error that a rank met while writing, without torch's wrapping; one of the system's, if there is one."""
    failures = getattr(error, "failures", None) or {}
    said = [
        f"{str(failure).removeprefix('Worker failure: ')} (rank {rank})"
        for rank, (failure, _) in sorted(failures.items())
    ]
    return next((text for text in said if "[Errno" in text), said[0] if said else str(error))


def write_format(folder: Path) -> None:
    """mcore's metadata.json: which format the shards are in."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class ResultsFile:
    """Where a writing process leaves its results for its rank; takes the place of mcore's queue.

    mcore's is a server process of its own, which costs seconds to start and outlives a rank that is killed.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process

    def clear(self) -> None:
        """Forgets what a failed attempt left."""
        os.ftruncate(self._file.fileno(), 0)

    def put(self, results: Any) -> None:
        """Called once, by the writing process."""
        os.pwrite(self._file.fileno(), pickle.dumps(results), 0)

    def get_nowait(self) -> Any:
        """Called when the writing process has ended; queue.Empty if it left nothing."""
        size = os.fstat(self._file.fileno()).st_size
        if not size:
            raise queue.Empty
        return pickle.loads(os.pread(self._file.fileno(), size, 0))


def use_results_file() -> ResultsFile:
    """Has mcore's writer put its results into a ResultsFile from now on, and returns that."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not isinstance(filesystem_async._results_queue, ResultsFile):
        filesystem_async._results_queue = ResultsFile()
    return filesystem_async._results_queue
