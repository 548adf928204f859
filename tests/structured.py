"""Trajectories with exact log-probs that a small model learns at once: some tokens are sure, some are not."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

VOCAB_SIZE = 64
_OPENERS, _CLOSERS = range(2, 10), range(10, 60)
_SURE = 0.95


def _next(token: int) -> int | None:
    """What mostly follows a token; None = any of the closers, alike."""
    if token in _OPENERS:
        return None
    return 2 + token % 8 if token % 3 else 10 + 7 * token % 50


def _step(token: int, rng: random.Random) -> tuple[int, float]:
    """The token after this one, and its log-prob."""
    likely = _next(token)
    sure = likely is not None and rng.random() < _SURE
    following = likely if sure and likely is not None else rng.choice(_CLOSERS)
    probability = (1 - _SURE if likely is not None else 1.0) / len(_CLOSERS) * (following in _CLOSERS)
    if following == likely:
        probability += _SURE
    return following, math.log(probability)


def make_rows(
    count: int, *, tokens: int = 60, prompt: int = 4, shift: int = 0, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows whose behaviour log-probs stand ``shift`` tokens later than they should."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        ids, logprobs = [rng.choice(_CLOSERS)], [0.0]
        while len(ids) < tokens:
            token, logprob = _step(ids[-1], rng)
            ids.append(token)
            logprobs.append(logprob)
        moved = [logprobs[(t - shift) % tokens] for t in range(tokens)]
        mask = [0] * prompt + [1] * (tokens - prompt)
        behavior = [value if m else None for value, m in zip(moved, mask, strict=True)]
        rows.append({"id": f"row-{i}", "input_ids": ids, "loss_mask": mask, "behavior_logprobs": behavior})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
