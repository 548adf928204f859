"""Two checkpoints are compared problem by problem, and only where that means something."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("scipy", reason="needs the extra eval")

from pear_megatron.cli import app
from pear_megatron.errors import EvalError
from pear_megatron.evaluate.paired import compare, read_arm
from pear_megatron.evaluate.results import ProblemResult, Results
from tests.evaluate.words import save_word_model, write_problems

SETTINGS = {
    "model": "m",
    "weights": "w",
    "problems": "p",
    "num_samples": 8,
    "temperature": 1.0,
    "max_new_tokens": 9,
}


def results(right: np.ndarray, **settings: object) -> Results:
    problems = [ProblemResult(f"p{i}", int(c), c / 8, 5.0, 0.0) for i, c in enumerate(right)]
    return Results({**SETTINGS, **settings}, 1.0, [1, 8], problems)


def difficulties(rng: np.random.Generator) -> np.ndarray:
    return rng.beta(0.5, 0.5, size=200)  # problems differ far more than checkpoints


def test_pairing_sees_a_difference_that_two_intervals_do_not() -> None:
    rng = np.random.default_rng(3)
    p = difficulties(rng)
    first, second = results(rng.binomial(8, 0.87 * p)), results(rng.binomial(8, p), model="n", weights="x")
    c = compare([first], [second])["pass@1"]
    assert c.difference.mean == pytest.approx(c.second.mean - c.first.mean)
    assert c.difference.low > 0
    assert c.first.high > c.second.low


def test_a_checkpoint_does_not_differ_from_itself() -> None:
    right = np.random.default_rng(0).binomial(8, 0.3, size=60)
    d = compare([results(right)], [results(right)])["pass@8"].difference
    assert d.mean == 0.0
    assert d.low < 0.0 < d.high


def test_several_runs_of_an_arm_widen_its_interval_by_how_much_they_differ() -> None:
    rng = np.random.default_rng(5)
    p = difficulties(rng)
    alike = [results(rng.binomial(8, p), seed=s) for s in range(3)]
    apart = [results(rng.binomial(8, p * factor), seed=s) for s, factor in enumerate((0.6, 0.8, 1.0))]
    base = [results(rng.binomial(8, p), seed=s) for s in range(3)]
    narrow = compare(base, alike)["pass@1"].difference
    wide = compare(base, apart)["pass@1"].difference
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


@pytest.mark.parametrize(("key", "value"), [("problems", "q"), ("temperature", 0.7), ("max_new_tokens", 10)])
def test_what_was_evaluated_otherwise_is_not_compared(key: str, value: object) -> None:
    right = np.arange(8)
    with pytest.raises(EvalError, match=key):
        compare([results(right)], [results(right, **{key: value})])
    with pytest.raises(EvalError, match="give as many on both sides"):
        compare([results(right)] * 2, [results(right)])


def test_the_command_evaluates_and_compares(word_model: Path, tmp_path: Path) -> None:
    problems = write_problems(tmp_path)
    other = save_word_model(tmp_path / "other", seed=1)
    for name, model in (("first-0", word_model), ("second-0", other)):
        command = ["eval", "--model", str(model), "--problems", str(problems)]
        options = ["--output", str(tmp_path / name), "--num-samples", "4", "--max-new-tokens", "5"]
        done = CliRunner().invoke(app, [*command, *options, "--k", "1,2", "--k", "4"])
        assert done.exit_code == 0, done.output
        assert all(f"pass@{k}" in done.output for k in (1, 2, 4))
        assert {path.name for path in (tmp_path / name).iterdir()} >= {
            "samples.jsonl",
            "results.json",
            "settings.json",
        }
    arms = [f"{tmp_path}/first-*", f"{tmp_path}/second-0/results.json"]
    done = CliRunner().invoke(app, ["eval-compare", *arms, "--output", str(tmp_path / "compared")])
    assert done.exit_code == 0, done.output
    assert "difference" in done.output
    measures = json.loads((tmp_path / "compared" / "comparison.json").read_text())["measures"]
    expected = compare(read_arm(arms[0]), read_arm(arms[1]))
    assert measures["pass@4"]["difference"]["mean"] == expected["pass@4"].difference.mean


def test_mistakes_on_the_command_line_end_with_a_message(word_model: Path, tmp_path: Path) -> None:
    evaluation = ["eval", "--model", str(word_model), "--output", str(tmp_path / "out")]
    for arguments, message in (
        (["eval-compare", str(tmp_path), str(tmp_path / "x")], "no results at"),
        ([*evaluation, "--problems", str(write_problems(tmp_path)), "--k", "one"], "--k one"),
        ([*evaluation, "--problems", str(tmp_path / "p.jsonl")], "--grader"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1
        assert "error: " in done.output
        assert message in done.output
    for missing in (["eval", "--model", str(word_model)], ["eval-compare", str(tmp_path)]):
        assert CliRunner().invoke(app, missing).exit_code == 2  # named by the usage line
