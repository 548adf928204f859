"""A job killed again and again ends in the file of an uninterrupted one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pear_megatron.errors import ScoreError
from pear_megatron.score.run import ScoreJob
from tests.score import jobs
from tests.score.jobs import run_job, settings, some_rows, write_jsonl


@pytest.mark.parametrize(("when", "at_least"), [("renames", 6), ("moments", 3)])
def test_job_killed_again_and_again_ends_in_the_same_bytes(
    when: str, at_least: int, tiny_llama: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", some_rows(30))
    whole, often_killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    run_job(data, whole, tiny_llama, chunk_rows=4)
    done = subprocess.run(
        [
            sys.executable,
            str(Path(jobs.__file__).with_name("killed.py")),
            tiny_llama,
            data,
            often_killed,
            when,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= at_least
    assert often_killed.read_bytes() == whole.read_bytes()
    assert pq.read_table(whole)["id"].to_pylist() == [
        row.get("id", f"{data}:{i}") for i, row in enumerate(some_rows(30), 1)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "killed.parquet", "whole.parquet"]


def test_unfinished_work_is_not_continued_by_another_command(tiny_llama: Path, tmp_path: Path) -> None:
    data, output = write_jsonl(tmp_path / "in.jsonl", some_rows(6)), tmp_path / "out.parquet"
    ScoreJob(settings(data, output, tiny_llama)).prepare()  # and then it was killed
    with pytest.raises(ScoreError) as error:
        run_job(data, output, tiny_llama, max_length=64)
    assert f"the unfinished work in {output}.parts belongs to another command" in str(error.value)
    assert "--max-length: 128 there, 64 now" in str(error.value)
    run_job(data, output, tiny_llama, max_length=64, overwrite=True)
    assert pq.read_metadata(output).num_rows == 6
    assert run_job(data, output, tiny_llama, max_length=64, max_tokens_per_batch=30) is False
