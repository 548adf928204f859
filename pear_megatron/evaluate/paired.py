"""compare: two checkpoints, or two arms of several runs each, on the same problems."""

from __future__ import annotations

import glob
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pear_megatron.errors import EvalError
from pear_megatron.evaluate.results import Results, read_results
from pear_megatron.evaluate.settings import OF_THE_RUN
from pear_megatron.evaluate.statistics import Estimate, interval
from pear_megatron.storage import describe_changes, write_atomically


@dataclass(frozen=True)
class Comparison:
    """One measure of two arms, and the second minus the first, paired by problem and run."""

    first: Estimate
    second: Estimate
    difference: Estimate


def read_arm(paths: str) -> list[Results]:
    """The results that comma-separated paths and globs name, one a run, in order (globs sorted)."""
    found: list[str] = []
    for part in paths.split(","):
        pattern = part.strip()
        found += [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
    if not found:
        raise EvalError(f"no results at {paths}; name folders that pear-megatron eval --output wrote")
    return [read_results(path) for path in found]


def compare(first: list[Results], second: list[Results]) -> dict[str, Comparison]:
    """Every measure that both arms can be asked for.

    Run r of the first arm is paired with run r of the second (the same RL seed, say).
    """
    if len(first) != len(second):
        raise EvalError(
            f"{len(first)} run(s) against {len(second)}: give as many on both sides; run 1 is paired with run 1, "
            "and so on"
        )
    everyone = [*first, *second]
    base = everyone[0]
    for other in everyone[1:]:
        changed = describe_changes(base.settings, other.settings, but=OF_THE_RUN)
        if other.right_at != base.right_at:
            changed = f"{changed}, right_at {base.right_at} -> {other.right_at}".removeprefix(", ")
        if changed:
            raise EvalError(
                f"{base.settings['model']} and {other.settings['model']} were evaluated with other settings "
                f"({changed}); evaluate both with the same"
            )
    most = min(results.num_samples for results in everyone)
    measures = [m for m in base.measures() if not m.startswith("pass@") or int(m[5:]) <= most]
    return {measure: _compare(first, second, measure) for measure in measures}


def _compare(first: list[Results], second: list[Results], measure: str) -> Comparison:
    values = [np.stack([r.values(measure) for r in arm]) for arm in (first, second)]  # [R, P] each
    bounds = [results.bounds(measure) for results in (*first, *second)]
    low, high = min(b[0] for b in bounds), max(b[1] for b in bounds)
    return Comparison(
        interval(values[0], bounds=(low, high)),
        interval(values[1], bounds=(low, high)),
        interval(values[1] - values[0], bounds=(low - high, high - low)),
    )


def write_comparison(path: Path, names: tuple[str, str], comparison: dict[str, Comparison]) -> None:
    """Writes a comparison as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "first": names[0],
        "second": names[1],
        "difference": "second - first, paired by problem and run",
        "measures": {measure: asdict(c) for measure, c in comparison.items()},
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")
