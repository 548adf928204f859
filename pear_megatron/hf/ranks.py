"""Work that only some ranks do and that no rank may go on after if it failed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pear_megatron.errors import PearError
from pear_megatron.megatron.checkpoint.state import CheckpointError


def together(work: Callable[[], None] | None) -> None:
    """Runs this rank's part of the work (None: it has none), then waits for the others.

    Raises:
        PearError: on every rank, what the first rank that failed raised; an OSError becomes a CheckpointError.
    """
    failure: PearError | None = None
    try:
        if work is not None:
            work()
    except PearError as error:
        failure = error
    except OSError as error:
        failure = CheckpointError(f"cannot write: {error}")
        failure.__cause__ = error
    failures = [failure]
    if torch.distributed.is_initialized():
        failures = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failures, failure)
    for found in failures:
        if found is not None:
            raise found
