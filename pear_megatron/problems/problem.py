"""Problem sets: prompts with a grader, from reasoning-gym or from a JSONL file, the same for eval and RL.

problems = load_problems(ProblemsConfig(jsonl="problems.jsonl", grader="grader.py"))
problems[0].prompt, problems[0].grade("The answer is 4.")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pear_megatron.data.errors import RowProblem
from pear_megatron.problems.graders import checked_score
from pear_megatron.schema import StrictModel

Messages = list[dict[str, str]]


class ProblemsConfig(StrictModel):
    """Where problems come from: reasoning-gym, or a JSONL file with a grader.

    Attributes:
        reasoning_gym: names of its data sets, or a mapping from each to its options; they take turns.
        jsonl: a file of ``prompt`` (a string, or messages that end with the user's turn) and ``answer``,
            optionally ``id``; any other field reaches the grader too.
        grader: the Python file with ``def grade(response, answer, problem) -> float`` for ``jsonl``.
        size: how many problems; with ``jsonl`` that many are drawn (None = all, in the file's order).
        seed: of generating or drawing; a held-out set has another one.
        system_prompt: a system turn before the prompt. With reasoning-gym and ``answer_tag``, reasoning-gym's
            own, which explains the tags, stands in for None; "" is none.
        extract: what of a response reasoning-gym grades: the text between the last <answer> and </answer>,
            the last number, or the whole.
    """

    reasoning_gym: dict[str, dict[str, Any]] | None = None
    jsonl: str | None = None
    grader: str | None = None
    size: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    system_prompt: str | None = None
    extract: Literal["answer_tag", "last_number", "whole"] = "answer_tag"

    @field_validator("reasoning_gym", mode="before")
    @classmethod
    def _names_to_options(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {value: {}}
        if isinstance(value, (list, tuple)):
            return {name: {} for name in value}
        return {name: options or {} for name, options in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.reasoning_gym) == bool(self.jsonl):
            raise ValueError("give either reasoning_gym (names of data sets) or jsonl (a file) with grader")
        if self.jsonl and not self.grader:
            raise ValueError(
                f"jsonl {self.jsonl} needs grader: a Python file with `def grade(response, answer, problem)`"
            )
        if self.jsonl and self.extract != "answer_tag":
            raise ValueError("extract is for reasoning_gym; with jsonl the grader gets the whole response")
        if self.reasoning_gym and self.grader:
            raise ValueError("grader is for jsonl; reasoning-gym brings its own")
        if self.reasoning_gym and self.size is None:
            raise ValueError("reasoning_gym makes as many problems as one likes; say how many: size")
        return self


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: unique in its set.
        where: FILE:LINE, or the reasoning-gym data set.
        prompt: a string, or messages of ``role`` and ``content``.
        answer: what the grader compares with.
        grader: the grader's file, or what stands for it in messages.
        score: grades a response, unchecked.
    """

    id: str
    where: str
    prompt: str | Messages
    answer: Any
    grader: str
    score: Callable[[str], Any] = field(repr=False)

    def grade(self, response: str) -> float:
        """The grader's score of a response."""
        return checked_score(lambda: self.score(response), self.grader, f"{self.id} ({self.where})", response)


@dataclass(frozen=True)
class ProblemSet(Sequence[Problem]):
    """Problems in a fixed order.

    Attributes:
        problems: the problems.
        graded_by: the grader's source text, or what stands for it.
    """

    problems: tuple[Problem, ...]
    graded_by: str

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, i: Any) -> Any:
        return self.problems[i]

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    def without(self, held_out: ProblemSet) -> ProblemSet:
        """The problems whose prompt is none of ``held_out``'s."""
        prompts = {json.dumps(problem.prompt) for problem in held_out}
        kept = tuple(problem for problem in self if json.dumps(problem.prompt) not in prompts)
        return ProblemSet(kept, self.graded_by)

    @property
    def prompts_digest(self) -> str:
        """Sixteen hex characters that differ when an id or a prompt does."""
        return _digest([[problem.id, problem.prompt] for problem in self])

    @property
    def grading_digest(self) -> str:
        """Sixteen hex characters that differ when an answer or the grader's file does."""
        return _digest([self.graded_by, [problem.answer for problem in self]])


def with_system(prompt: str | Messages, system: str | None) -> str | Messages:
    """The prompt with a system turn before it; RowProblem where it has one already."""
    if not system:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] == "system":
        raise RowProblem("prompt has a system turn of its own; leave system_prompt out")
    return [{"role": "system", "content": system}, *messages]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=repr).encode()).hexdigest()[:16]
