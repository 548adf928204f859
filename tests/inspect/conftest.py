"""Trajectories with both policies' log-probs, and inspect run on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.byte_tokenizer import save_byte_tokenizer
from tests.inspect.scored_rows import Inspect, Inspected, Row
from tests.structured import write_rows


@pytest.fixture
def inspect(tmp_path: Path) -> Inspect:
    """Runs `pear-megatron inspect` in this process."""
    from pear_megatron.cli import app

    output = tmp_path / "inspect.html"

    def run(*arguments: object) -> Inspected:
        for path in (output, output.with_suffix(".json")):
            path.unlink(missing_ok=True)
        done = CliRunner().invoke(app, ["inspect", *map(str, arguments), "--output", str(output)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        numbers = output.with_suffix(".json")
        return Inspected(
            done.exit_code,
            done.stdout,
            done.stderr,
            output.read_text() if output.exists() else None,
            json.loads(numbers.read_text()) if numbers.exists() else {},
        )

    return run


@pytest.fixture
def look(inspect: Inspect, tmp_path: Path) -> Inspect:
    """Inspects rows that carry policy_logprobs."""

    def run(rows: list[Row], *options: object) -> Inspected:
        return inspect(write_rows(tmp_path / "data.jsonl", rows), "--scored", *options)

    return run


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")
