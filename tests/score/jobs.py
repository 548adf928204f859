"""Input rows and `score` jobs for the tests, in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pear_megatron.data import DataConfig, TrajectoryDataset, prepare
from pear_megatron.data.columns import ALL_COLUMNS, Columns
from pear_megatron.score.ranks import Ranks
from pear_megatron.score.run import ScoreJob
from pear_megatron.score.source import ScoreSettings
from tests.score.tiny import VOCAB_SIZE

Row = dict[str, Any]


def chat_row(user: str, *answers: str, **fields: Any) -> Row:
    """A conversation: each answer after the user's first, then second, ... message."""
    messages = []
    for k, answer in enumerate(answers):
        messages.append({"role": "user", "content": user if k == 0 else "go on"})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, **fields}


def some_rows(count: int, seed: int = 0) -> list[Row]:
    """Conversations and rows of ids, of many lengths."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for i in range(count):
        length = rng.randint(1, 12)
        if i % 3:
            text = "".join(rng.choice("abc 123") for _ in range(length)) + "x"
            rows.append(chat_row("hi", text, id=f"chat-{i}", reward=rng.choice([1.0, -0.5])))
        else:
            ids = [rng.randrange(256) for _ in range(length + 2)]
            rows.append({"input_ids": ids, "loss_mask": [0] + [1] * (length + 1), "metadata": {"i": i}})
    return rows


def rows_of_ids(count: int, longest: int = 20, seed: int = 0) -> list[Row]:
    """Rows that need no tokenizer."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for i in range(count):
        n = rng.randint(2, longest)
        ids = [rng.randrange(256) for _ in range(n)]
        rows.append({"id": f"ids-{i}", "input_ids": ids, "loss_mask": [0] + [1] * (n - 1)})
    return rows


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(data: Path, output: Path, model: Path | None, **changes: Any) -> ScoreSettings:
    options: dict[str, Any] = {"backend": "hf", "chunk_rows": 4, **changes}
    return ScoreSettings(data=[str(data)], output=output, model=model and str(model), **options)


def run_job(data: Path, output: Path, model: Path | None, **changes: Any) -> bool:
    """Runs one job; returns whether there was anything to do."""
    job = ScoreJob(settings(data, output, model, **changes))
    with Ranks() as ranks:
        if ranks.from_main(job.prepare):
            return False
        job.score(ranks)
    return True


def score_rows(folder: Path, rows: list[Row], model: Path | None, **changes: Any) -> list[Row]:
    """The rows of the output."""
    data = write_jsonl(folder / "in.jsonl", rows)
    run_job(data, folder / "out.parquet", model, **changes)
    return pq.read_table(folder / "out.parquet").to_pylist()


def opened(
    file: Path, *, behavior: bool = True, columns: Columns = ALL_COLUMNS, **options: Any
) -> TrajectoryDataset:
    """The file as training opens it."""
    config = DataConfig(train=[str(file)], **{"seq_length": 128, "cache_dir": f"{file}-cache", **options})
    needs = {"require_behavior_logprobs": behavior, "columns": columns}
    return TrajectoryDataset.open(prepare(config, vocab_size=VOCAB_SIZE, **needs))
