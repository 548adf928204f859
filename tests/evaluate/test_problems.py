"""Problem sets are the same every time, and what is wrong with one is said with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pear_megatron.data.errors import DataError
from pear_megatron.errors import RecipeError
from pear_megatron.problems.graders import GraderError, load_grader
from pear_megatron.problems.load import load_problems, read_problems_config
from pear_megatron.problems.problem import ProblemsConfig, ProblemSet
from pear_megatron.problems.reasoning_gym import last_number

GRADER = "def grade(response, answer, problem):\n    return response == answer\n"


def problem_set(folder: Path, rows: list[object], grader: str = GRADER, **options: object) -> ProblemSet:
    data, code = folder / "problems.jsonl", folder / "grader.py"
    data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    code.write_text(grader)
    return load_problems(ProblemsConfig(jsonl=str(data), grader=str(code), **options))


def test_the_grader_gets_response_answer_and_row(tmp_path: Path) -> None:
    row = {"id": "x", "prompt": "q", "answer": 4, "level": 2}
    grader = (
        f"def grade(response, answer, problem):\n    return (response, answer, problem) == ('r', 4, {row})\n"
    )
    (problem,) = problem_set(tmp_path, [row], grader)
    assert problem.grade("r") == 1.0
    assert problem.grade("s") == 0.0


def test_a_grader_imports_what_stands_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_the_grader.py").write_text("right = 'yes'\n")
    grader = "from beside_the_grader import right\n" + GRADER.replace("== answer", "== right")
    (problem,) = problem_set(tmp_path, [{"prompt": "q", "answer": ""}], grader)
    assert problem.grade("yes") == 1.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, "'answer'"),
        ({"answer": 1}, "prompt = None"),
        ({"prompt": "", "answer": 1}, "prompt = ''"),
        ({"prompt": [{"role": "user"}], "answer": 1}, "prompt[0]"),
        ({"prompt": [{"role": "assistant", "content": "hi"}], "answer": 1}, "must end with the user's"),
        ({"prompt": [{"role": "usr", "content": "hi"}], "answer": 1}, "'usr'"),
        ({"prompt": "q", "answer": 1, "id": "first"}, "also that of"),
        ({"prompt": "q", "answer": 1, "id": [1]}, "id = [1]"),
        ("{broken", "not valid JSON"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError) as error:
        problem_set(tmp_path, [{"id": "first", "prompt": "q", "answer": 1}, row])
    assert f"{tmp_path}/problems.jsonl:2: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("float('nan')", "grade returned nan"),
        ("None", "grade returned None"),
        ("'1.0'", "grade returned '1.0'"),
        ("1 / 0", "grader.py:2: grade raised ZeroDivisionError"),
    ],
)
def test_a_bad_grade_names_the_problem_and_its_line(tmp_path: Path, body: str, message: str) -> None:
    grader = f"def grade(response, answer, problem):\n    return {body}\n"
    problems = problem_set(
        tmp_path, [{"prompt": "q", "answer": 1}, {"id": "p7", "prompt": "q", "answer": 1}], grader
    )
    with pytest.raises(GraderError) as error:
        problems[1].grade("hello")
    for part in (message, "problem p7", "problems.jsonl:2", "'hello'"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "no grader at"),
        ("x = 1\n", "no function grade"),
        ("x = 1\ndef grade(:\n", "grader.py:2"),
        ("\nimport nothing_such\n", "grader.py:2"),
        ("import sys\nsys.exit(3)\n", "the grader cannot be imported: SystemExit: 3"),
        ("def grade(response, answer):\n    return 1\n", "grade cannot be called with three arguments"),
    ],
)
def test_a_bad_grader_file_is_named_with_its_line(tmp_path: Path, code: str | None, message: str) -> None:
    if code is not None:
        (tmp_path / "grader.py").write_text(code)
    with pytest.raises(GraderError) as error:
        load_grader(tmp_path / "grader.py")
    assert message in str(error.value)
    assert str(tmp_path / "grader.py") in str(error.value)


def test_drawing_some_of_a_file_depends_on_the_seed_alone(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"q{i}", "answer": 1} for i in range(50)]
    draws = [[p.id for p in problem_set(tmp_path, rows, size=10, seed=seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(DataError, match="has 50 problems, and size asks for 51"):
        problem_set(tmp_path, rows, size=51)


def test_training_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    train = problem_set(tmp_path, [{"id": i, "prompt": f"q{i}", "answer": 1} for i in range(6)])
    held_out = problem_set(tmp_path, [{"id": f"v{i}", "prompt": f"q{2 * i}", "answer": 1} for i in range(9)])
    assert [problem.prompt for problem in train.without(held_out)] == ["q1", "q3", "q5"]


def test_digests_tell_prompts_from_grading(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "answer": 1}]
    base = problem_set(tmp_path, rows)
    regraded = problem_set(tmp_path, rows, GRADER + "# stricter\n")
    asked_otherwise = problem_set(tmp_path, rows, system_prompt="Be brief.")
    assert base.prompts_digest == regraded.prompts_digest != asked_otherwise.prompts_digest
    assert base.grading_digest == asked_otherwise.grading_digest != regraded.grading_digest


def test_the_command_line_names_problems_by_file_or_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="name one with --grader"):
        read_problems_config(str(tmp_path / "p.jsonl"))
    (tmp_path / "p.py").write_text(GRADER)
    assert read_problems_config(str(tmp_path / "p.jsonl")).grader == str(tmp_path / "p.py")
    recipe = Path(__file__).parents[2] / "recipes" / "grpo_trl" / "puzzles.yaml"
    assert read_problems_config(str(recipe)).size == 100
    (tmp_path / "set.yaml").write_text("reasoning_gym: gcd\nsise: 3\n")
    with pytest.raises(RecipeError, match="did you mean 'size'"):
        read_problems_config(str(tmp_path / "set.yaml"))


def test_reasoning_gym_sets_of_other_seeds_are_other_problems() -> None:
    pytest.importorskip("reasoning_gym", reason="needs the extra rl")

    def prompts(seed: int) -> list[str]:
        config = ProblemsConfig(
            reasoning_gym=["chain_sum", "gcd"], size=40, seed=seed, system_prompt="", extract="whole"
        )
        return [str(problem.prompt) for problem in load_problems(config)]

    assert prompts(0) == prompts(0)
    assert len(set(prompts(0)) & set(prompts(1))) <= 2


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Not 77 but 1,234,567.", "1234567"),
        ("12-5", "5"),
        ("5 - 7 = -2", "-2"),
        ("of 3, 4 and 2.50", "2.50"),
        ("none", None),
    ],
)
def test_the_last_number_is_read_as_people_write_it(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_reasoning_gym_grades_what_is_extracted() -> None:
    pytest.importorskip("reasoning_gym", reason="needs the extra rl")

    def first(**options: str):  # type: ignore[no-untyped-def]
        return load_problems(ProblemsConfig(reasoning_gym={"gcd": {"max_value": 9}}, size=1, **options))[0]

    tagged, number, whole = first(), first(extract="last_number"), first(extract="whole")
    assert isinstance(tagged.prompt, list)  # the system turn that explains the tags
    assert isinstance(number.prompt, str)
    answer = tagged.answer
    assert tagged.grade(f"Hm. <answer>{answer}</answer>") == 1.0
    assert tagged.grade(f"It is {answer}") < 1.0
    assert number.grade(f"Not 77 but {answer}.") == whole.grade(f" {answer}\n") == 1.0
    assert number.grade("no idea") == 0.0
    with pytest.raises(DataError, match="refuses the options"):
        load_problems(ProblemsConfig(reasoning_gym={"gcd": {"max_valeu": 9}}, size=1))
    with pytest.raises(DataError, match="no data set 'gdc'"):
        load_problems(ProblemsConfig(reasoning_gym="gdc", size=1))
