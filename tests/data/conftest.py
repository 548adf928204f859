"""Configurations and real tokenizers for the data tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pear_megatron.data import DataConfig
from tests.byte_tokenizer import make_byte_tokenizer


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DataConfig]:
    """A DataConfig for the files of a test; the cache goes into the test's folder."""

    def make(*files: Path | str, **options: Any) -> DataConfig:
        settings = {"seq_length": 16, "cache_dir": str(tmp_path / "cache"), **options}
        return DataConfig(train=[str(file) for file in files], **settings)

    return make


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., Any]:
    """Makes a fast tokenizer over bytes with the ChatML special tokens and a given template."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    return make_byte_tokenizer
