"""Whatever a generator's answers hold: a scored file that training reads, or a RowProblem."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pear_megatron.data import DataConfig, TrajectoryDataset, prepare
from pear_megatron.data.columns import ALL_COLUMNS
from pear_megatron.data.errors import Problems, RowProblem
from pear_megatron.data.files import read_rows
from pear_megatron.score.chunks import WorkFolder
from pear_megatron.score.rows import RowReader
from tests.fuzz.test_rows import as_lines
from tests.fuzz.values import damaged, examples, folder_alone, in_time
from tests.score import recorded_cases
from tests.score.test_recorded_rows import readable

GOOD = [*readable().values(), recorded_cases.case("tool"), recorded_cases.case("oai_responses")]


@functools.cache
def reader(raw: bool, top_k: int) -> tuple[Counter[str], RowReader]:
    """With its counts; the digest of the tokenizer is what takes time."""
    counts: Counter[str] = Counter()
    tokenizer = recorded_cases.tokenizer()
    return counts, RowReader("import", counts, tokenizer=tokenizer, raw_logprobs=raw, top_k=top_k)


@examples(60)
@given(row=st.sampled_from(GOOD).flatmap(damaged), raw=st.booleans(), top_k=st.sampled_from([0, 2]))
def test_recorded(row: Any, raw: bool, top_k: int) -> None:
    with folder_alone() as folder:
        (folder / "a.jsonl").write_bytes(as_lines([row]))
        counts, read = reader(raw, top_k)
        found, problems = [], Problems()
        for one in read_rows(folder / "a.jsonl", problems, strict=False):
            try:
                found += read(replace(one, where="in.jsonl:1"))
            except RowProblem:
                return
        if not found:
            assert problems.total
            return
        work = WorkFolder(folder / "scored.parquet")
        work.start({})
        work.write_chunks(found, counts, max_rows=2, max_tokens=50)
        work.finish(counts, len(work.read_index()[0]), scored=False)
        config = DataConfig(
            train=[str(work.output)], seq_length=4096, cache_dir=str(folder / "cache"), truncated="keep"
        )
        with in_time():
            dataset = TrajectoryDataset.open(prepare(config, columns=ALL_COLUMNS))
        assert [t.id for t in dataset] == [one.trajectory.id for one in found]
