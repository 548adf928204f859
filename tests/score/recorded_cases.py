"""The rows in recorded_rows, and what `score --backend import` makes of a row."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pear_megatron.data.errors import RowProblem
from pear_megatron.data.files import Row
from pear_megatron.data.tokenizer import load_tokenizer
from pear_megatron.score.rows import RowReader, ScoreRow
from tests.smollm2 import smollm2_folder

FOLDER = Path(__file__).parent / "recorded_rows"
RESPONSE = [23390, 28, 339, 1510, 30, 47526, 5549, 246, 94, 25972, 2]
LOGPROBS = [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8, -0.9, -1.0, -1.1]
MESSAGES = [{"role": "user", "content": "Name a colour."}]
TEXT = "Blue, I think. 🙂 Ünï"


def case(name: str) -> dict[str, Any]:
    """The row of a file."""
    return dict(json.loads((FOLDER / f"{name}.jsonl").read_text()))


def prompt_ids() -> list[int]:
    """The context of all rows."""
    return list(case("slime")["tokens"][: -len(RESPONSE)])


@functools.cache
def tokenizer() -> Any:
    """SmolLM2's, with the chat template that the rows were made with."""
    trl = pytest.importorskip("trl", reason="needs the extra rl: its chat templates")
    loaded = load_tokenizer(str(smollm2_folder()))
    loaded.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    return loaded


def reader(raw: bool = False, with_tokenizer: bool = True) -> RowReader:
    """A new one, with no notes yet."""
    return RowReader("import", Counter(), tokenizer=tokenizer() if with_tokenizer else None, raw_logprobs=raw)


_reader = functools.cache(reader)


def read(
    row: dict[str, Any], *, raw: bool = False, with_tokenizer: bool = True, by: RowReader | None = None
) -> list[ScoreRow]:
    """The rows of the output; RowProblem if the row is wrong."""
    plain = {name: value for name, value in json.loads(json.dumps(row)).items() if value is not None}
    return (by or _reader(raw, with_tokenizer))(Row("in.jsonl:1", plain, 1))


def refuses(words: str, row: dict[str, Any], **options: Any) -> None:
    """`read` raises RowProblem with these words."""
    with pytest.raises(RowProblem, match=words):
        read(row, **options)


def check_tokens(row: ScoreRow) -> None:
    """It has the context, the tokens and the log-probs of the files."""
    trajectory, context = row.trajectory, prompt_ids()
    assert trajectory.input_ids.tolist() == context + RESPONSE
    assert trajectory.loss_mask.tolist() == [False] * len(context) + [True] * len(RESPONSE)
    expected = np.array([0.0] * len(context) + LOGPROBS, dtype=np.float32)
    np.testing.assert_array_equal(trajectory.behavior_logprobs, expected)
