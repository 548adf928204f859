"""Valid rows, chat templates, and writing them to files, for the data tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CHATML_WITH_MARKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As reasoning models do: the thinking of an earlier turn disappears once a later turn is there.
CHATML_THAT_FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Row = dict[str, Any]


def a_row(n: int = 8, prompt: int = 3, **changes: Any) -> Row:
    """A valid row of n tokens, the first ``prompt`` of which are no decisions; None takes a field away."""
    row: Row = {
        "input_ids": list(range(1, n + 1)),
        "loss_mask": [0] * prompt + [1] * (n - prompt),
        "behavior_logprobs": [None] * prompt + [-0.1 * (i + 1) for i in range(n - prompt)],
    }
    row.update(changes)
    return {name: value for name, value in row.items() if value is not None}


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_parquet(path: Path, rows: list[Row], logprob_type: pa.DataType | None = None) -> Path:
    """Every field of any row is a column, null where a row has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
    if logprob_type is not None:
        columns["behavior_logprobs"] = columns["behavior_logprobs"].cast(logprob_type)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path
