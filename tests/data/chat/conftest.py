"""Tokenizers of many families, made once."""

from __future__ import annotations

import pytest
from chat_tokenizers import Families

from pear_megatron.data import load_tokenizer
from tests.smollm2 import smollm2_folder


@pytest.fixture(scope="session")
def families() -> Families:
    pytest.importorskip("transformers", reason="needs the extra hf")
    return Families(load_tokenizer(str(smollm2_folder())))
