"""The data of the comparison on real text: the teacher's right answers, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra rl")

from examples.puzzles import problems
from examples.puzzles.teacher import write_right_answers
from pear_megatron.problems.load import load_problems


def test_only_right_and_whole_answers_become_trajectories(tmp_path: Path) -> None:
    problems.write_problem_set(tmp_path / "asked.yaml", problems.training(3, seed=5))
    asked = load_problems(problems.training(3, seed=5))
    rows = []
    for problem in asked:
        right, wrong = f" The answer is {problem.answer}.", "The answer is -77."
        for sample, (text, truncated) in enumerate([(right, False), (wrong, False), (right, True)]):
            row = {"id": problem.id, "sample": sample, "response": text, "truncated": truncated}
            rows.append({**row, "score": problem.grade(text)})
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        write_right_answers(tmp_path / "samples.jsonl", tmp_path / "asked.yaml", tmp_path / "right.jsonl")
        == 3
    )
    written = [json.loads(line) for line in (tmp_path / "right.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == [f"{problem.id}/0" for problem in asked]
    for row, problem in zip(written, asked, strict=True):
        assert row["messages"] == [
            *problem.prompt,
            {"role": "assistant", "content": f"The answer is {problem.answer}."},
        ]


def test_another_seed_asks_other_puzzles() -> None:
    first, second = (load_problems(problems.training(20, seed=seed)) for seed in (0, 1))
    assert first.prompts_digest != second.prompts_digest
