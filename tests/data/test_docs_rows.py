"""The rows of docs/data.md are taken as they stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_rows import write_jsonl

from pear_megatron.data import DataConfig, TrajectoryDataset, prepare
from pear_megatron.data.columns import ALL_COLUMNS

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_every_row_of_the_page_is_taken_and_is_what_the_page_says(
    tmp_path: Path, config: Callable[..., DataConfig], byte_tokenizer: Callable[..., Any]
) -> None:
    trl = pytest.importorskip("trl")
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    tokenizer = byte_tokenizer(template)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    blocks = re.findall(r"```json\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    assert len(rows) == 11
    file = write_jsonl(tmp_path / "a.jsonl", [{**row, "id": str(i)} for i, row in enumerate(rows)])
    settings = {"tokenizer": str(tmp_path / "tokenizer"), "seq_length": 4096}
    dataset = TrajectoryDataset.open(prepare(config(file, **settings), require_behavior_logprobs=False))

    def decisions(identity: str) -> str:
        (found,) = [t for t in dataset if t.id.partition("#")[0] == identity][-1:]
        return str(tokenizer.decode(found.input_ids[found.loss_mask].tolist()))

    thought = "<think>\nadd\n</think>\n\n4<|im_end|>"
    assert [decisions(i) for i in "01345"] == ["4<|im_end|>", thought, "Hello!<|im_end|>", thought, thought]
    assert "What?" not in "".join(decisions(t.id.partition("#")[0]) for t in dataset)
    assert {t.id.partition("#")[0] for t in dataset} == {str(i) for i in range(11)}
    assert dataset[-2].token_weights is not None
    last = write_jsonl(tmp_path / "last.jsonl", rows[-1:])
    (whole,) = TrajectoryDataset.open(prepare(config(last), columns=ALL_COLUMNS))
    assert whole.behavior_topk is not None
    assert whole.behavior_topk.counts.tolist() == [2, 3]
    assert whole.reference_logprobs is not None
    assert min(t.reward for t in dataset) == -0.5
    call = next(t for t in dataset if t.id in ("6", "6#0"))
    assert "get_weather" in tokenizer.decode(call.input_ids[call.loss_mask].tolist())
