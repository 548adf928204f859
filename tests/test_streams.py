"""A log whose reader has gone, a closed standard error, another alphabet, a full disk behind standard output."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.megatron.runs import (
    REPOSITORY,
    Started,
    metrics,
    run_entry_point,
    write_trajectories,
)


def _into_a_broken_pipe(rank: int, world: int, port: int, output: Connection, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as broken:
        run_entry_point(rank, world, port, broken, arguments)  # type: ignore[arg-type]


def test_training_goes_on_when_the_reader_of_its_log_has_gone(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl")
    arguments = [f"data.train={data}", f"output_dir={tmp_path / 'out'}", "train.max_steps=4"]
    assert Started(1, *arguments, target=_into_a_broken_pipe).wait() == [0]
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3, 4]
    assert (tmp_path / "out" / "checkpoints" / "iter_0000004").is_dir()


def command(code: str, closed: Sequence[int] = (), **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A process whose streams are steady, and what it says."""
    start = f"import sys\nfrom pear_megatron.streams import steady\nsteady()\n{code}"
    return subprocess.run(
        [sys.executable, "-c", start],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
        preexec_fn=lambda: [os.close(descriptor) for descriptor in closed],
    )


def test_letters_that_an_encoding_does_not_have_are_written_as_escapes() -> None:
    said = "print('5 \\u2212 3, \\xe4'); print('\\u2212', file=sys.stderr)"
    done = command(said, LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="latin-1")
    assert done.stdout == b"5 \\u2212 3, \xe4\n"
    assert done.stderr == b"\\u2212\n"
    assert command(said, PYTHONUTF8="1").stdout == "5 \u2212 3, ä\n".encode()


def test_a_closed_standard_error_is_no_error_and_no_file_takes_its_place(tmp_path: Path) -> None:
    code = f"print('lost', file=sys.stderr); open({str(tmp_path / 'file')!r}, 'w').write(str(sys.stderr.fileno()))"
    assert command(code, closed=[2]).returncode == 0
    assert (tmp_path / "file").read_text() == "2"


def test_results_that_find_a_full_disk_are_an_error_that_says_where() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pear_megatron.cli", "recipes", "list"],
            cwd=REPOSITORY,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == (
        "error: standard output: No space left on device; name another place, or make room there\n"
    )
