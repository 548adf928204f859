"""What a real vLLM server answered is read to the log-probs that transformers computes.

vLLM 0.32.0's build for CPUs served SmolLM2-135M in float32 (record_vllm.py).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pear_megatron.data.files import Row
from pear_megatron.data.tokenizer import load_tokenizer
from pear_megatron.score.rows import RowReader
from tests.score.record_vllm import ROWS
from tests.smollm2 import smollm2_folder

ANSWERS = {row["id"]: row for row in map(json.loads, ROWS.read_text(encoding="utf-8").splitlines())}


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2_folder()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ANSWERS)
def test_log_probs_are_the_models(name: str, folder: Path, model: Any) -> None:
    top_k = 5 if name == "chat_top5" else 0
    reader = RowReader("import", Counter(), tokenizer=load_tokenizer(str(folder)), top_k=top_k)
    (row,) = reader(Row("in.jsonl:1", ANSWERS[name], 1))
    found = row.trajectory
    ids = torch.from_numpy(found.input_ids.astype(np.int64))
    with torch.no_grad():
        logprobs = model(ids[None]).logits[0].log_softmax(-1)  # [n, V]
    expected = logprobs[:-1].gather(-1, ids[1:, None])[:, 0].numpy()
    decisions = np.flatnonzero(found.loss_mask)
    np.testing.assert_allclose(found.behavior_logprobs[decisions], expected[decisions - 1], atol=1e-3)
    # All that was sampled is a decision: the answer's tokens, its end of turn among them.
    response = ANSWERS[name]["response"]
    usage = (response[-1] if isinstance(response, list) else response).get("usage") or {}
    if name != "given_chat" and "completion_tokens" in usage:
        assert len(decisions) == usage["completion_tokens"]
    if top_k:
        likeliest = logprobs.topk(top_k).indices.numpy()
        for t, entries in zip(decisions, found.behavior_topk.padded(top_k + 1)[0], strict=True):
            assert set(likeliest[t - 1]) <= set(entries.tolist())
