"""Results: what a problem's responses come to, the estimates over problems, and results.json."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pear_megatron.errors import EvalError
from pear_megatron.evaluate.statistics import Estimate, interval, pass_at_k
from pear_megatron.storage import write_atomically

FILE = "results.json"
SHARE = (0.0, 1.0)


@dataclass(frozen=True)
class ProblemResult:
    """One problem's responses: how many were right, and means over them."""

    id: str
    right: int
    score: float
    response_tokens: float
    truncated: float


@dataclass(frozen=True)
class Results:
    """An evaluation's outcome.

    Attributes:
        settings: as settings.json has them.
        right_at: the score from which a response is right.
        ks: the k of pass@k that were asked for.
        problems: in the problem set's order.
    """

    settings: dict[str, Any]
    right_at: float
    ks: list[int]
    problems: list[ProblemResult]

    @property
    def num_samples(self) -> int:
        """Responses to each problem."""
        return int(self.settings["num_samples"])

    def values(self, measure: str) -> np.ndarray:
        """One number a problem [P]: of ``pass@K``, ``score``, ``response_tokens`` or ``truncated``."""
        if measure.startswith("pass@"):
            right = np.array([problem.right for problem in self.problems])
            return pass_at_k(self.num_samples, right, int(measure.removeprefix("pass@")))
        return np.array([getattr(problem, measure) for problem in self.problems], dtype=np.float64)

    def measures(self) -> list[str]:
        """The names of what is estimated."""
        return [*(f"pass@{k}" for k in self.ks), "score", "response_tokens", "truncated"]

    def estimates(self) -> dict[str, Estimate]:
        """Means over the problems with 95 % intervals."""
        return {m: interval(self.values(m), bounds=self.bounds(m)) for m in self.measures()}

    def bounds(self, measure: str) -> tuple[float, float]:
        """What one problem's value can be at least and at most."""
        if measure == "score":
            scores = self.values(measure)
            return min(0.0, float(scores.min())), max(1.0, float(scores.max()))
        return (1.0, float(self.settings["max_new_tokens"])) if measure == "response_tokens" else SHARE

    def write(self, folder: Path) -> None:
        """Writes results.json, whole or not at all."""
        content = {
            "settings": self.settings,
            "num_problems": len(self.problems),
            "right_at": self.right_at,
            "k": self.ks,
            "estimates": {name: asdict(estimate) for name, estimate in self.estimates().items()},
            "problems": [asdict(problem) for problem in self.problems],
        }
        write_atomically(folder / FILE, json.dumps(content, indent=1) + "\n")


def read_results(path: str | Path) -> Results:
    """The results in a folder or a results.json; EvalError where there are none."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        problems = [ProblemResult(**problem) for problem in content["problems"]]
        return Results(content["settings"], content["right_at"], content["k"], problems)
    except FileNotFoundError as error:
        raise EvalError(
            f"no results at {file}; run pear-megatron eval first, or name its --output"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvalError(f"{file} holds no results of pear-megatron eval: {error!r}") from error


def summarize(rows: Sequence[dict[str, Any]], ids: Sequence[str], right_at: float) -> list[ProblemResult]:
    """Rows of samples.jsonl by problem, in the order of ``ids``."""
    by_id = defaultdict(list)
    for row in rows:
        by_id[row["id"]].append(row)
    return [
        ProblemResult(
            id=problem_id,
            right=sum(row["score"] >= right_at for row in by_id[problem_id]),
            score=float(np.mean([row["score"] for row in by_id[problem_id]])),
            response_tokens=float(np.mean([len(row["tokens"]) for row in by_id[problem_id]])),
            truncated=float(np.mean([row["truncated"] for row in by_id[problem_id]])),
        )
        for problem_id in ids
    ]
