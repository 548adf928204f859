"""The steps world: programs' solutions are right, rows say what they should, draws are from what the teacher wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra rl")

from examples.steps import rows, student, teacher, world
from examples.steps.grader import grade


@pytest.mark.parametrize("family", world.FAMILIES)
@pytest.mark.parametrize("plain", [0.0, 1.0])
def test_programs_write_right_solutions(family: str, plain: float) -> None:
    rng = np.random.default_rng(0)
    for problem in world.problems(family, seed=1, count=100):
        solution = world.write_solution(rng, problem, plain)
        assert grade(solution, problem.answer, {}) == 1.0
        assert len(solution) < world.LONGEST
        assert set(problem.prompt + solution) <= set(world.TOKENS)
        for step in solution.split("#")[0].split(";")[:-1]:
            _check_step(step, problem)


def _check_step(step: str, problem: world.Problem) -> None:
    left, right = step.split("=")
    if problem.family == "bases":
        quotient, remainder = right.split("r")
        base = int(problem.prompt.split(">")[1])
        assert int(remainder, base) < int(left[1:])
        assert int(quotient) * int(left[1:]) + int(remainder, base) <= int(problem.prompt.split(">")[0])
    else:
        assert 2 <= len(left) <= 2 * world.LARGEST_STEP


def test_plain_solutions_take_one_operation_to_a_step_and_terse_ones_up_to_four() -> None:
    rng = np.random.default_rng(0)
    sums = world.problems("sums", seed=2, count=200)
    assert {tuple(world.step_sizes(world.write_solution(rng, p, 1.0))) for p in sums} == {(1,) * 7}
    terse = [world.step_sizes(world.write_solution(rng, p, 0.0)) for p in sums]
    assert {size for sizes in terse for size in sizes} == {1, 2, 3, 4}
    assert {sum(sizes) for sizes in terse} == {7}


def test_steps_are_judged_by_the_step_before() -> None:
    problem = world.Problem("sums", "3+4-7+2-9+5-1+6", "3")
    # 3+4-7 is 0; written as 1; from there everything is right.
    assert world.steps_right(problem, "+4-7=1;+2=3;-9+5=-1;-1+6=4;#4") == [
        (2, False),
        (1, True),
        (2, True),
        (2, True),
    ]
    assert grade("+4-7=1;+2=3;-9+5=-1;-1+6=4;#4", problem.answer, {}) == 0.0


def test_the_grader_reads_what_follows_the_last_mark() -> None:
    assert grade(" + 4 = 7 ; # - 3", "-3", {}) == 1.0
    assert grade("#1;#-3", "-3", {}) == 1.0
    assert grade("-3", "-3", {}) == 0.0
    assert grade("#-3;", "-3", {}) == 0.0


def test_the_tokenizer_and_the_rows_agree(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    row = rows.trajectory("a", "3+4", "+4=7;#7")
    prompt, solution = tokenizer("3+4")["input_ids"], tokenizer("+4=7;#7")["input_ids"]
    assert row["input_ids"] == [*prompt, *solution, tokenizer.eos_token_id]
    assert row["loss_mask"] == [0] * 3 + [1] * 8
    assert tokenizer.decode(solution) == "+4=7;#7"


def test_offline_data_are_drawn_without_putting_back(tmp_path: Path) -> None:
    source, output = tmp_path / "right.parquet", tmp_path / "offline.parquet"
    pq.write_table(pa.table({"id": [f"{i}" for i in range(20)]}), source)
    student.draw(source, output, np.random.default_rng(0), 10)
    drawn = pq.read_table(output)["id"].to_pylist()
    assert len(set(drawn)) == 10
    student.draw(source, output, np.random.default_rng(1), 10)
    assert pq.read_table(output)["id"].to_pylist() != drawn
    with pytest.raises(SystemExit, match="20 rows, 30 are asked for"):
        student.draw(source, output, np.random.default_rng(0), 30)


def test_the_teachers_right_and_wrong_solutions_go_to_their_files(tmp_path: Path) -> None:
    rows.write_problems(tmp_path / "asked.jsonl", [world.Problem("sums", "1+2", "3")] * 3)
    (tmp_path / "asked").mkdir()
    samples = [("+2=3;#3", 1.0, False), ("+2=4;#4", 0.0, False), ("+2=3;#3", 1.0, True)]
    (tmp_path / "asked" / "samples.jsonl").write_text(
        "".join(
            json.dumps({"id": f"asked-0000{i}", "response": text, "score": score, "truncated": truncated})
            + "\n"
            for i, (text, score, truncated) in enumerate(samples)
        )
    )
    for name, reward, solution in (("right", 1.0, "+2=3;#3"), ("wrong", -1.0, "+2=4;#4")):
        teacher.write_solutions(tmp_path, name, reward)
        (row,) = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert row == rows.trajectory(row["id"], "1+2", solution, reward)


def test_a_teacher_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"plain": 0.5}')
    with pytest.raises(SystemExit, match="choose another --output"):
        teacher.main(["--output", str(tmp_path), "--num-training", "10"])
