"""Engines are found by name, and one that does not fit the command line is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pear_megatron.cli import app
from pear_megatron.rl.engine import ENGINES, find_engine
from tests.rl.nemo_rl.exports import write_export

PUZZLES = Path(__file__).parents[2] / "recipes" / "grpo_trl" / "puzzles.yaml"


def grpo(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["grpo", "--config", str(PUZZLES), "--checkpoint", "x", *words])
    return done.exit_code, done.stderr


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_is_whole(name: str) -> None:
    engine = find_engine(name)
    assert isinstance(engine.output, bool)
    assert all(callable(getattr(engine, part)) for part in ("load_recipe", "dry_run", "run"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--engine", "ray"], "--engine ray: there is none of that name; name nemo-rl or trl"),
        (["--engine", "trl"], "--engine trl needs --output"),
        (["--output", "out"], "--engine nemo-rl has no --output"),
    ],
)
def test_a_command_line_that_does_not_fit_the_engine_is_refused(words: list[str], says: str) -> None:
    code, stderr = grpo(*words)
    assert code == 1
    assert says in stderr


def test_a_dry_run_with_trl_says_what_it_would_train_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym", reason="needs the extra rl")
    monkeypatch.chdir(tmp_path)
    write_export(tmp_path / "export")
    sizes = ["grpo.max_num_steps=3", "data.train.size=40", "data.validation.size=2"]
    command = ["grpo", "--engine", "trl", "--config", str(PUZZLES), "--checkpoint", "export", "--dry-run"]
    done = CliRunner().invoke(app, [*command, *sizes])
    assert done.exit_code == 0, done.stderr
    assert "3 steps of 16 x 8 rollouts on 40 problems, from export" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
