"""The pear-megatron command, as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.megatron.runs import write_trajectories


def pear_megatron(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pear_megatron.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_validate_says_what_is_in_the_data(tmp_path: Path) -> None:
    done = pear_megatron("validate", str(write_trajectories(tmp_path / "data.jsonl", count=7)))
    assert done.returncode == 0, done.stderr
    assert "trajectories" in done.stdout
    assert " 7 " in done.stdout


def test_validate_fails_with_file_line_and_field(tmp_path: Path) -> None:
    data = write_trajectories(tmp_path / "data.jsonl", count=3)
    data.write_text(data.read_text().replace('"loss_mask"', '"loss_maks"', 1))
    done = pear_megatron("validate", str(data))
    assert done.returncode == 1
    assert f"{data}:1" in done.stderr
    assert "loss_mask" in done.stderr


def test_help_shows_an_example() -> None:
    assert "Example: pear-megatron validate" in pear_megatron("validate", "--help").stdout
