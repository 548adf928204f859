"""The steps world: programs' solutions are right, rows say what they should, draws are from what the teacher wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra rl")

from examples.steps import draw, rows, sorting, student, styles, teacher, world
from examples.steps.grader import grade


@pytest.mark.parametrize("plain", [0.0, 1.0])
def test_programs_write_right_solutions(plain: float) -> None:
    rng = np.random.default_rng(0)
    sizes = set()
    for problem in world.problems(seed=1, count=100):
        solution = world.write_solution(rng, problem, plain)
        assert grade(solution, problem.answer, {}) == 1.0
        assert len(solution) < world.LONGEST
        assert "#" not in world.write_solution(rng, problem, plain, answered=False)
        assert set(problem.prompt + solution) <= set(world.TOKENS)
        steps = world.steps(problem, solution)
        assert sum(size for size, _ in steps) == world.TERMS - 1
        assert all(right for _, right in steps)
        sizes |= {size for size, _ in steps}
    assert sizes == ({1} if plain else {1, 2, 3, 4})


def test_programs_sort_both_ways() -> None:
    problems = sorting.problems(seed=1, count=100)
    assert {problem.prompt[0] for problem in problems} == {"+", "-"}
    for problem in problems:
        digits = problem.prompt[1:].split(";")
        assert problem.answer == "".join(sorted(digits, reverse=problem.prompt[0] == "-"))
        solution = sorting.write_solution(problem)
        assert set(problem.prompt + solution) <= set(world.TOKENS)
        assert grade(solution, problem.answer, {}) == 1.0
        assert len(solution) < world.LONGEST
    assert sorting.write_solution(sorting.Problem("-5;3;9;1;7;2", "975321")) == (
        "=5=53=953=9531=97531=975321;#975321"
    )


def test_steps_are_judged_by_the_step_before() -> None:
    problem = world.Problem("3+4-7+2-9+5-1+6", "3")
    solution = "+4-7=1;+2=3;-9+5=-1;-1+6=4;#4"  # 3+4-7 is 0; from there everything follows
    assert world.steps(problem, solution) == [(2, False), (1, True), (2, True), (2, True)]
    assert grade(solution, problem.answer, {}) == 0.0


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
    draw.draw(source, output, np.random.default_rng(0), 10)
    drawn = pq.read_table(output)["id"].to_pylist()
    assert len(set(drawn)) == 10
    draw.draw(source, output, np.random.default_rng(1), 10)
    assert pq.read_table(output)["id"].to_pylist() != drawn
    with pytest.raises(SystemExit, match="20 rows, 30 are asked for"):
        draw.draw(source, output, np.random.default_rng(0), 30)


@pytest.mark.parametrize("sorts", [False, True])
def test_a_seed_has_problems_of_the_family_asked_for(tmp_path: Path, sorts: bool) -> None:
    for name in ("right", "wrong"):
        pq.write_table(pa.table({"id": ["a", "b"]}), tmp_path / f"{name}.parquet")
    counts = [f"--num-{name}=2" for name in ("offline", "negatives", "problems")]
    draw.main(["--teacher", str(tmp_path), "--output", str(tmp_path), *counts, *(["--sorting"] * sorts)])
    family = sorting if sorts else world
    found = [(row["prompt"], row["answer"]) for row in rows.read_rows(tmp_path / "problems.jsonl")]
    assert found == [(p.prompt, p.answer) for p in family.problems(0, 2)]


def test_the_teachers_right_and_wrong_solutions_go_to_their_files(tmp_path: Path) -> None:
    rows.write_problems(tmp_path / "asked.jsonl", [world.Problem("1+2", "3")] * 3)
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


def test_a_student_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    rows.mark_made(tmp_path, {"solutions": 56_000, "answered": True, "sorting": False, "train": []})
    given = ["--teacher", str(tmp_path), "--output", str(tmp_path)]
    student.main(given)
    for other in ("--unanswered", "--sorting"):
        with pytest.raises(SystemExit, match="choose another --output"):
            student.main([*given, other])


def test_the_plain_share_counts_operations_and_judges_their_steps(tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    rows.write_problems(heldout, [world.Problem("3+4-7+2-9+5-1+6", "3")])
    answers = ("+4=7;-7+2-9=-7;+5-1=-3;+6=4;#4", "+4-7=0;+2-9=-7;+5-1+6=3;#3")  # two plain steps, one right
    rows.write_rows(
        tmp_path / "samples.jsonl", ({"id": "heldout-00000", "response": answer} for answer in answers)
    )
    assert styles.plain_steps(tmp_path, styles.read_problems(heldout)) == (pytest.approx(1 / 7), 0.5)


def test_a_first_step_is_right_when_it_takes_the_next_operations_to_the_right_value(tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    rows.write_problems(heldout, [world.Problem("3+4-7+2-9+5-1+6", "3")])
    right, wrong = ("+4=7;#3", "+4-7+2=2;"), ("+4=8;", "-7=-4;", "+4-7+9=9;", "#3", "", "+4+4=11", "=+4=7")
    rows.write_rows(
        tmp_path / "samples.jsonl",
        ({"id": "heldout-00000", "response": answer} for answer in (*right, *wrong)),
    )
    assert styles.first_steps_right(tmp_path, styles.read_problems(heldout)) == pytest.approx(2 / 9)
