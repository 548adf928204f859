"""The tiny model that the tests of eval and of GRPO with TRL share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def word_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.evaluate.words import save_word_model

    return save_word_model(tmp_path_factory.mktemp("models") / "words")
