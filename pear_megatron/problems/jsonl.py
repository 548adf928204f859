"""Problems from a JSONL file, graded by a Python file."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_megatron.data.errors import DataError, Problems, RowProblem
from pear_megatron.data.fields import short
from pear_megatron.data.files import read_rows
from pear_megatron.problems.graders import Grade, load_grader
from pear_megatron.problems.problem import Messages, Problem, ProblemsConfig, with_system

_ROLES = ("system", "user", "assistant")


def read_problems(config: ProblemsConfig) -> list[Problem]:
    """The problems of ``config.jsonl``: all in the file's order, or ``config.size`` drawn with its seed."""
    assert config.jsonl
    assert config.grader
    grade = load_grader(config.grader)
    path = Path(config.jsonl).expanduser()
    if not path.is_file() or not path.stat().st_size:
        raise DataError(f"{path}: no such file, or it is empty; write one problem a line")
    problems: list[Problem] = []
    wrong = Problems()
    seen: dict[str, str] = {}
    for row in read_rows(path, wrong, strict=False):
        try:
            problem = _problem(row.fields, row.where, grade, config)
            if problem.id in seen:
                raise RowProblem(f"id {problem.id!r} is also that of {seen[problem.id]}; ids must be unique")
        except RowProblem as error:
            wrong.add(row.where, error)
            continue
        seen[problem.id] = row.where
        problems.append(problem)
    wrong.raise_if_any()
    if config.size is None:
        return problems
    if config.size > len(problems):
        raise DataError(f"{path}: has {len(problems)} problems, and size asks for {config.size}; lower it")
    chosen = sorted(random.Random(config.seed).sample(range(len(problems)), config.size))
    return [problems[i] for i in chosen]


def _problem(fields: dict[str, Any], where: str, grade: Grade, config: ProblemsConfig) -> Problem:
    problem_id = fields.get("id", where.rpartition("/")[2])
    if isinstance(problem_id, bool) or not isinstance(problem_id, (str, int)) or problem_id == "":
        raise RowProblem(f"id = {short(problem_id)}; it must be a string or an integer")
    if "answer" not in fields:
        raise RowProblem(
            f"no field 'answer' among {', '.join(fields)}; add it (\"\" if the grader needs none)"
        )
    prompt = with_system(_prompt(fields.get("prompt")), config.system_prompt)
    row = {**fields, "id": str(problem_id)}
    assert config.grader
    return Problem(str(problem_id), where, prompt, row["answer"], config.grader, _Score(grade, row))


@dataclass(frozen=True)
class _Score:
    grade: Grade
    row: dict[str, Any]

    def __call__(self, response: str) -> Any:
        return self.grade(response, self.row["answer"], self.row)


def _prompt(prompt: Any) -> str | Messages:
    if isinstance(prompt, str) and prompt:
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise RowProblem(
            f"prompt = {short(prompt)}; it must be a string or a list of {{role, content}}, not empty"
        )
    messages: Messages = []
    for k, message in enumerate(prompt):
        keys = set(message) if isinstance(message, dict) else None
        if keys != {"role", "content"} or not all(isinstance(value, str) for value in message.values()):
            raise RowProblem(f"prompt[{k}] = {short(message)}; it must be {{role, content}}, both strings")
        if message["role"] not in _ROLES:
            raise RowProblem(f"prompt[{k}].role = {short(message['role'])}; known: {', '.join(_ROLES)}")
        messages.append({"role": message["role"], "content": message["content"]})
    if messages[-1]["role"] != "user":
        raise RowProblem(f"prompt ends with the {messages[-1]['role']}'s turn; it must end with the user's")
    return messages
