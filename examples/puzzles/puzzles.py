"""Easy reasoning-gym puzzles as chats, and their grader."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

# Small enough that a 135M-parameter model is right now and then; every answer is a whole number.
TASKS: dict[str, dict[str, int]] = {
    "letter_counting": {"min_words": 2, "max_words": 3},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_value": 2, "max_value": 20},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
SYSTEM = "You solve puzzles. Answer with one short sentence."
NUM_SHOTS = 2
_SHOT_SEED = 1_000_003  # the solved examples come from another seed than the puzzles
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Puzzle:
    """A puzzle, the chat that asks it, and reasoning-gym's data set, which grades it."""

    id: str
    task: str
    messages: Messages
    answer: str
    _entry: dict[str, Any] = field(repr=False)
    _dataset: Any = field(repr=False)

    def grade(self, response: str) -> float:
        """reasoning-gym's score, 0 to 1, of the last number in the response (0 without one)."""
        numbers = _NUMBER.findall(response)
        return float(self._dataset.score_answer(numbers[-1], self._entry)) if numbers else 0.0


def make_puzzles(count: int, seed: int) -> list[Puzzle]:
    """``count`` puzzles, the tasks taking turns, each after two solved examples of its task."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("the puzzles need reasoning-gym; pip install 'pear-megatron[rl]'") from error

    per_task = -(-count // len(TASKS))
    datasets = {
        task: reasoning_gym.create_dataset(task, size=per_task, seed=seed, **options)
        for task, options in TASKS.items()
    }
    shots = {}
    for task, options in TASKS.items():
        solved = reasoning_gym.create_dataset(task, size=NUM_SHOTS, seed=_SHOT_SEED, **options)
        shots[task] = [turn for entry in solved for turn in _turns(entry["question"], entry["answer"])]
    puzzles = []
    for i in range(count):
        task = list(TASKS)[i % len(TASKS)]
        entry = datasets[task][i // len(TASKS)]
        messages = [{"role": "system", "content": SYSTEM}, *shots[task], *_turns(entry["question"])]
        puzzles.append(
            Puzzle(f"{task}-{seed}-{i:04d}", task, messages, entry["answer"], entry, datasets[task])
        )
    return puzzles


def _turns(question: str, answer: str | None = None) -> Messages:
    turns = [{"role": "user", "content": question.strip()}]
    if answer is not None:
        turns.append({"role": "assistant", "content": f"The answer is {answer}."})
    return turns
