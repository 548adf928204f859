"""What every test starts from: the same seed, files with slow tests first, GPU tests only where there is a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.smollm2 import smollm2_folder

settings.register_profile(  # a loaded machine is slow, and that is no fault of the test
    "pear", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pear")


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct: float32 safetensors, configurations, tokenizer."""
    return smollm2_folder()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A worker takes whole files: the longest must not come last, with the other workers idle.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
