"""Tensors are made on the card, and memory that torch hands out holds NaN until it is written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.claims import MODULES, RanksOn
from tests.gpu.device import DEVICE


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        yield
        return
    for module in MODULES:
        if hasattr(module, "run_ranks"):
            monkeypatch.setattr(module, "run_ranks", RanksOn(DEVICE))
    with torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (and the largest integer), in the ops' own buffers too."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
