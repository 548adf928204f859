"""run_schedule: Megatron's pipeline schedule over the micro-batches of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any


def run_schedule(
    forward_step: Callable[..., Any],
    micro_batches: Iterable[Any],
    chunks: list[Any],
    *,
    count: int,
    shape: tuple[int, int],
    flat: bool = False,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Runs forward passes, and backward ones unless ``forward_only``, on every rank.

    Args:
        forward_step: Megatron's forward step function.
        micro_batches: of this rank; every chunk sees each of them.
        chunks: this rank's model chunks.
        count: number of micro-batches.
        shape: rows and positions of a micro-batch.
        flat: the model takes them as a single row (Transformer Engine's packed sequences).
        collect_non_loss_data: the loss function returns something else than a loss.

    Returns:
        What the loss function reported for each micro-batch, on the last pipeline stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    rows, positions = shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(itertools.tee(micro_batches, len(chunks))),
        model=chunks,
        num_microbatches=count,
        seq_length=rows * positions if flat else positions,
        micro_batch_size=1 if flat else rows,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )
