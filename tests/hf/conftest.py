"""The small models, made once, and one converted checkpoint of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.hf.models import MODELS, save_model, save_tokenizer
from tests.hf.ranks import rank_convert


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> Hugging Face folder; that of qwen3-tied has a tokenizer."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    root = tmp_path_factory.mktemp("hf")
    folders = {name: save_model(name, root / name) for name in MODELS}
    save_tokenizer(folders["qwen3-tied"])
    return folders


@pytest.fixture(scope="session")
def converted(hf_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> checkpoint, converted at TP = 2 x PP = 2."""
    root = tmp_path_factory.mktemp("converted")
    run_ranks(4, rank_convert, hf_models, root, 2, 2)
    return {name: root / name for name in hf_models}
