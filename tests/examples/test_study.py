"""docs/study.md says what the committed numbers say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.publish_study import IMAGES, NUMBERS, STUDY, fill, foretold_table, lengths_table, starts_figure

PUBLISHED = sorted(NUMBERS.glob("*.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_committed_results(path: Path) -> None:
    text = STUDY.read_text()
    assert f"<!-- table {path.stem} -->" in text
    assert fill(text, path.stem, json.loads(path.read_text())) == text


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_committed_results_know_no_machine(path: Path) -> None:
    assert "/work/" not in path.read_text()
    assert "/home/" not in path.read_text()


def test_a_table_is_put_where_its_marks_are_and_nowhere_else() -> None:
    estimate = {"mean": 0.25, "low": 0.1, "high": 0.4}
    arm = {"measures": {"after/pass@1": estimate}, "against_baseline": None}
    better = {"measures": {"after/pass@1": estimate}, "against_baseline": {"after/pass@1": estimate}}
    results = {
        "seeds": [0, 1],
        "measures": {"after/pass@1": "pass@1 after RL"},
        "arms": {"SFT": arm, "token": better},
    }
    text = "a\n<!-- table x -->\nold\n<!-- end -->\nb\n<!-- table y -->\nkept\n<!-- end -->\n"
    filled = fill(text, "x", results | {"tuning": {}})
    assert "old" not in filled
    assert "kept" in filled
    assert "| SFT | 0.250 [0.100, 0.400] |" in filled
    assert "| token | 0.250 [0.100, 0.400]<br>**+0.250 [+0.100, +0.400]** |" in filled
    assert fill(filled, "x", results | {"tuning": {}}) == filled


def test_a_shorter_rl_is_read_off_the_curves() -> None:
    flat, early = [[0.5] * 40, [0.3] * 40], [[0.5] * 10 + [0.7] * 30, [0.3] * 10 + [0.5] * 20 + [0.3] * 10]
    results = {"baseline": "SFT", "arms": {"SFT": {"rewards": flat}, "token": {"rewards": early}}}
    header, _, sft, token = lengths_table(results).splitlines()
    assert header == "| RL steps | 20 | 40 |"
    assert sft == "| SFT | 0.400 | 0.400 |"
    assert token == "| token | 0.600 **+0.200 [+0.200, +0.200]** | 0.500 |"  # at 40, 0.2 and 0 of two seeds


def test_what_foretold_take_off_counts_runs_that_differ_from_the_baseline() -> None:
    def arm(*steps: int | None) -> dict:
        return {"take_off": list(steps), "rewards": [[0.0] * 40] * 3}

    results = {
        "baseline": "SFT",
        "arms": {"SFT": arm(30, 30, None), "early": arm(20, 30, 10), "never": arm(None, None, None)},
        "styles": {  # early: right in two runs of two; never: right in one of two
            "SFT": {"right, before RL": [0.2, 0.2, 0.2], "right after RL": [1.0, 1.0, 1.0]},
            "early": {"right, before RL": [0.3, 0.1, 0.3], "right after RL": [1.0, 1.0, 1.0]},
            "never": {"right, before RL": [0.1, 0.3, 0.1], "right after RL": [1.0, 1.0, 1.0]},
        },
    }
    assert foretold_table(results).splitlines()[2:] == ["| right | 3 of 4 | 2 of 2 | -1.00 |"]


def test_the_picture_of_readme_shows_each_seed_against_sft_on_the_same_seed() -> None:
    results = json.loads((NUMBERS / "stretches.json").read_text())
    drawn = [
        line.get_xdata().tolist() for line in starts_figure(results).axes[1].lines if line.get_marker() == "o"
    ]
    assert drawn[0] == [0] * 8
    took_off = [results["arms"][arm]["take_off"] for arm in ("SFT", "sequence")]
    assert drawn[-1] == [ours - sft for sft, ours in zip(*took_off, strict=True)]
    assert (IMAGES / "study_stretches_starts.png").stat().st_size > 5000


def test_the_tuning_runs_of_the_student_that_cannot_answer_are_those_of_the_page() -> None:
    text, rates = STUDY.read_text(), ("0.00025", "0.0005", "0.001")
    runs = json.loads((NUMBERS / "tuning" / "steps_unanswered.json").read_text())
    for student, arms in runs.items():
        for arm, tried in arms.items():
            means = (f"{sum(tried[r]) / len(tried[r]):.3f}" if r in tried else "-" for r in rates)
            assert f"| {student} steps | {arm} | {' | '.join(means)} |" in text
