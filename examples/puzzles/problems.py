"""Easy reasoning-gym puzzles: solved ones as dialogues to train on, others held out to evaluate on."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from pear_megatron.problems.load import load_problems
from pear_megatron.problems.problem import ProblemsConfig
from pear_megatron.storage import write_atomically

# Small enough that a 135M-parameter model is right now and then; every answer is a whole number.
TASKS: dict[str, dict[str, int]] = {
    "letter_counting": {"min_words": 2, "max_words": 3},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_value": 2, "max_value": 20},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
SYSTEM = "You solve puzzles. Answer with one short sentence."
_HELD_OUT_SEED = 1_000_003


def training(size: int, seed: int = 0) -> ProblemsConfig:
    """The problems whose solutions are trained on."""
    return _problems(size, seed)


def held_out(size: int) -> ProblemsConfig:
    """Problems from another seed."""
    return _problems(size, _HELD_OUT_SEED)


def _problems(size: int, seed: int) -> ProblemsConfig:
    return ProblemsConfig(
        reasoning_gym=TASKS, size=size, seed=seed, system_prompt=SYSTEM, extract="last_number"
    )


def write_dialogues(path: Path, config: ProblemsConfig, but_not: ProblemsConfig) -> None:
    """Solved problems as rows of ``messages``, with what reasoning-gym says is the answer.

    Problems that another set asks too are left out.
    """
    rows = []
    for problem in load_problems(config).without(load_problems(but_not)):
        solution = {"role": "assistant", "content": f"The answer is {problem.answer}."}
        messages = [*problem.prompt, solution]
        rows.append(json.dumps({"id": problem.id, "messages": messages}) + "\n")
    write_atomically(path, "".join(rows))


def write_problem_set(path: Path, config: ProblemsConfig) -> None:
    """The set as the YAML that ``pear-megatron eval --problems`` takes."""
    write_atomically(path, yaml.safe_dump(config.model_dump(exclude_defaults=True), sort_keys=False))
