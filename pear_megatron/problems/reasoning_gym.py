"""Problems made by reasoning-gym, graded by its own score_answer."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from pear_megatron.data.errors import DataError
from pear_megatron.data.fields import short
from pear_megatron.problems.problem import Problem, ProblemsConfig, with_system

_NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:\.\d+)?")  # 7-3 is no -3
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def make_problems(config: ProblemsConfig) -> list[Problem]:
    """The problems of ``config.reasoning_gym``, its data sets taking turns."""
    try:
        from reasoning_gym.utils import SYSTEM_PROMPTS
    except ImportError as error:
        raise ImportError(
            "reasoning_gym problems need reasoning-gym; pip install 'pear-megatron[rl]'"
        ) from error

    assert config.reasoning_gym
    assert config.size
    system = config.system_prompt
    if system is None and config.extract == "answer_tag":
        system = SYSTEM_PROMPTS["default"]
    per_name = -(-config.size // len(config.reasoning_gym))
    sets = [
        (name, _data_set(name, per_name, config.seed, options))
        for name, options in config.reasoning_gym.items()
    ]
    problems = []
    for i in range(config.size):
        name, data = sets[i % len(sets)]
        entry = data[i // len(sets)]
        problems.append(
            Problem(
                id=f"{name}-{config.seed}-{i:05d}",
                where=f"reasoning-gym {name}",
                prompt=with_system(entry["question"].strip(), system),
                answer=entry["answer"],
                grader=f"reasoning-gym {name}",
                score=_Score(data, entry, config.extract),
            )
        )
    return problems


def _data_set(name: str, size: int, seed: int, options: dict[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise DataError(f"reasoning_gym: no data set {short(name)}; it has {', '.join(sorted(DATASETS))}")
    # reasoning-gym makes entry i from seed + i: its sets of seeds 0 and 1 would share all but one entry.
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4])
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=own_seed, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"reasoning_gym.{name}: it refuses the options {options}: {error}") from error


def last_number(text: str) -> str | None:
    """The last number of a text, without signs between its thousands."""
    return next(reversed(_NUMBER.findall(_THOUSANDS.sub("", text))), None)


@dataclass(frozen=True)
class _Score:
    data: Any
    entry: dict[str, Any]
    extract: str

    def __call__(self, response: str) -> Any:
        from reasoning_gym.utils import extract_answer

        if self.extract == "answer_tag":
            answer = extract_answer(response)
        elif self.extract == "last_number":
            answer = last_number(response)
        else:
            answer = response.strip()
        return self.data.score_answer(answer, self.entry)
