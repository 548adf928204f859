"""samples.jsonl: a line a response, written batch by batch; what a killed evaluation left is continued."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pear_megatron.storage import naming, write_atomically

log = logging.getLogger("pear_megatron")

FILE = "samples.jsonl"
_KEYS = {"id", "sample", "response", "score", "truncated", "tokens"}


class Slot(NamedTuple):
    """A response to be drawn: which problem, and which of its samples."""

    problem: int
    sample: int


def plan_batches(lengths: Sequence[int], num_samples: int, batch_size: int) -> list[list[Slot]]:
    """Every problem ``num_samples`` times, in batches of prompts of like length, the longest first.

    The plan depends on nothing else, so that an evaluation that is continued draws the same batches.
    """
    order = sorted(range(len(lengths)), key=lambda p: -lengths[p])
    slots = [Slot(p, s) for p in order for s in range(num_samples)]
    return [slots[i : i + batch_size] for i in range(0, len(slots), batch_size)]


def sample_seed(seed: int, problem_id: str, sample: int) -> int:
    """The seed of one response, below 2^56: the same whatever else is evaluated."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{problem_id}:{sample}".encode()).digest()[:7])


class SampleFile:
    """The file, opened to continue it.

    Args:
        path: of samples.jsonl.
        ids: the problems' ids.
        batches: the plan; a batch of which a line is missing is drawn again as a whole, since responses
            could differ in the last bit of a log-prob if they were drawn in other company.

    Attributes:
        rows: what is there, a row a response.
        missing: the batches still to be drawn.
    """

    def __init__(self, path: Path, ids: Sequence[str], batches: Sequence[Sequence[Slot]]) -> None:
        found = {(row["id"], row["sample"]): row for row in _whole_lines(path)}
        self._path = path
        self.rows: list[dict[str, Any]] = []
        self.missing: list[Sequence[Slot]] = []
        for batch in batches:
            there = [found.get((ids[slot.problem], slot.sample)) for slot in batch]
            kept = [row for row in there if row is not None]
            if len(kept) == len(batch):
                self.rows += kept
            else:
                self.missing.append(batch)
        self._rewrite()

    def grade_again(self, grade: Callable[[str, str], float]) -> None:
        """Replaces every score by ``grade(id, response)``."""
        for row in self.rows:
            row["score"] = grade(row["id"], row["response"])
        self._rewrite()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Appends the rows of one batch."""
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))
        self.rows += rows

    def _rewrite(self) -> None:
        write_atomically(self._path, "".join(map(_line, self.rows)))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation's samples.jsonl."""
    return _whole_lines(folder / FILE)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1]  # a killed run's last line has no end
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and row.keys() >= _KEYS
        except ValueError:
            whole = False
        if whole:
            rows.append(row)
        else:
            log.warning("%s:%d is damaged: the responses of its batch are drawn again", path, number)
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"
