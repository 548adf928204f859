"""What the cells came to: learning curves, take-off, pass@k before and after, differences with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pear_megatron.compare import stages
from pear_megatron.compare.cell import Cell
from pear_megatron.compare.recipe import CompareRecipe
from pear_megatron.errors import PearError
from pear_megatron.evaluate.results import SHARE, Results, read_results
from pear_megatron.evaluate.statistics import Estimate, interval, over_runs, p_value

WINDOW = 5  # steps of the mean that take-off is read from


@dataclass(frozen=True)
class CellResult:
    """One arm on one seed.

    Attributes:
        rewards: of each RL step, a mean over its rollouts [steps].
        before, after: evaluations; None where the cell has none (tuning).
    """

    cell: Cell
    rewards: np.ndarray
    before: Results | None
    after: Results | None

    @property
    def arm(self) -> str:
        """Name of the arm."""
        return self.cell.arm

    @property
    def seed(self) -> int:
        """The seed."""
        return self.cell.seed

    @property
    def mean_reward(self) -> float:
        """Over all of RL: the area under the learning curve, divided by its length."""
        return float(self.rewards.mean())

    def summary(self, recipe: CompareRecipe) -> str:
        """A line for people."""
        step = take_off(self.rewards, recipe.take_off)
        text = f"mean reward {self.mean_reward:.3f}, " + (
            f"took off at step {step}" if step else f"no take-off in {len(self.rewards)} steps"
        )
        if self.before and self.after:
            k = recipe.eval.k[0]
            values = [results.values(f"pass@{k}").mean() for results in (self.before, self.after)]
            text = f"pass@{k} {values[0]:.3f} -> {values[1]:.3f}, {text}"
        return text


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of the metrics.jsonl of a cell's stage; PearError where it is damaged."""
    path, rows = folder / "metrics.jsonl", []
    way_out = f"put it back, or remove {folder.parent}, which the same command then runs again"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise PearError(f"{path} cannot be read ({error.strerror}); {way_out}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise PearError(f"{path}:{number} is damaged; {way_out}") from error
        rows.append(row)
    return rows


def read_cell(cell: Cell) -> CellResult:
    """The result of a cell that is done; PearError where what it left is damaged."""
    rows, steps = read_metrics(cell.folder / stages.RL), cell.rl.grpo.max_num_steps
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        raise PearError(
            f"{cell.folder / stages.RL / 'metrics.jsonl'} does not have a row for each of the {steps} steps; put it "
            f"back, or remove {cell.folder}, which the same command then runs again"
        )
    rewards = np.array([row["reward"] for row in rows])
    before, after = (
        read_results(cell.folder / name) if cell.evaluated else None for name in (stages.BEFORE, stages.AFTER)
    )
    return CellResult(cell, rewards, before, after)


def take_off(rewards: np.ndarray, threshold: float) -> int | None:
    """The first step at which the mean reward of the last WINDOW steps reaches the threshold; None = none does."""
    if len(rewards) < WINDOW:
        return None
    means = np.convolve(rewards, np.full(WINDOW, 1.0 / WINDOW), mode="valid")
    reached = np.flatnonzero(means >= threshold - 1e-12)
    return int(reached[0]) + WINDOW if len(reached) else None


@dataclass(frozen=True)
class Measure:
    """A column of the table. Its estimates are kept: the bootstrap of a single seed takes a moment.

    Attributes:
        key, title: for JSON, for people.
        values: by arm: [R, P], one row per seed and one column per problem; or [R], one number per seed.
        bounds: of a value.
    """

    key: str
    title: str
    values: dict[str, np.ndarray]
    bounds: tuple[float, float]
    _estimates: dict[tuple[str, ...], Estimate] = field(default_factory=dict)

    def estimate(self, arm: str) -> Estimate:
        """The arm's mean."""
        if (arm,) not in self._estimates:
            self._estimates[arm,] = _estimate(self.values[arm], self.bounds)
        return self._estimates[arm,]

    def difference(self, arm: str, baseline: str) -> Estimate:
        """The arm minus the baseline, paired by seed (and problem)."""
        low, high = self.bounds
        if (arm, baseline) not in self._estimates:
            values = self.values[arm] - self.values[baseline]
            self._estimates[arm, baseline] = _estimate(values, (low - high, high - low))
        return self._estimates[arm, baseline]

    def p_value(self, arm: str, baseline: str) -> float:
        """That of the difference, uncorrected."""
        return p_value(self.values[arm] - self.values[baseline])


def _estimate(values: np.ndarray, bounds: tuple[float, float]) -> Estimate:
    return interval(values, bounds=bounds) if values.ndim == 2 else over_runs(values, bounds=bounds)


@dataclass(frozen=True)
class Outcome:
    """All results of the seeds that are complete.

    Attributes:
        recipe: the comparison.
        chosen: what tuning chose for each arm.
        results: seed by seed, in the arms' order.
        tuning: arm -> value -> mean reward on the tuning seed.
    """

    recipe: CompareRecipe
    chosen: dict[str, tuple[str, ...]]
    results: Sequence[CellResult]
    tuning: dict[str, dict[float, float]]

    @property
    def seeds(self) -> list[int]:
        """The complete ones."""
        return list(dict.fromkeys(result.seed for result in self.results))

    def of(self, arm: str) -> list[CellResult]:
        """An arm's results, a seed each."""
        return [result for result in self.results if result.arm == arm]

    def curves(self, arm: str) -> np.ndarray:
        """Rewards [R, steps]."""
        return np.stack([result.rewards for result in self.of(arm)])

    def take_offs(self, arm: str) -> list[int | None]:
        """Step of each seed's take-off."""
        return [take_off(rewards, self.recipe.take_off) for rewards in self.curves(arm)]

    @cached_property
    def measures(self) -> list[Measure]:
        """The table's columns."""
        measures = []
        for when in ("before", "after"):
            for k in self.recipe.eval.k:
                values = {
                    arm: np.stack([getattr(result, when).values(f"pass@{k}") for result in self.of(arm)])
                    for arm in self.recipe.arms
                }
                measures.append(Measure(f"{when}/pass@{k}", f"pass@{k} {when} RL", values, SHARE))
        steps = self.curves(self.recipe.baseline).shape[1]
        times = {
            arm: np.array([step or steps for step in self.take_offs(arm)], float) for arm in self.recipe.arms
        }
        area = {arm: self.curves(arm).mean(axis=1) for arm in self.recipe.arms}
        rewards = np.concatenate([self.curves(arm).ravel() for arm in self.recipe.arms])
        bounds = (min(0.0, float(rewards.min())), max(1.0, float(rewards.max())))
        measures.append(Measure("take_off", f"steps to reward {self.recipe.take_off:g}", times, (1.0, steps)))
        measures.append(Measure("mean_reward", "mean reward during RL", area, bounds))
        return measures

    def as_json(self) -> dict[str, Any]:
        """Everything the page shows, and each seed's curve."""
        arms, baseline = {}, self.recipe.baseline
        for arm in self.recipe.arms:
            differences = p_values = None
            if arm != baseline:
                differences = {m.key: asdict(m.difference(arm, baseline)) for m in self.measures}
                if len(self.seeds) > 1:
                    p_values = {m.key: m.p_value(arm, baseline) for m in self.measures}
            arms[arm] = {
                "overrides": self.recipe.arms[arm],
                "tuned": list(self.chosen.get(arm, ())),
                "measures": {m.key: asdict(m.estimate(arm)) for m in self.measures},
                "against_baseline": differences,
                "p_against_baseline": p_values,
                "take_off": self.take_offs(arm),
                "rewards": np.round(self.curves(arm), 6).tolist(),
            }
        tuning = {
            arm: {f"{value:g}": reward for value, reward in tried.items()}
            for arm, tried in self.tuning.items()
        }
        return {
            "seeds": self.seeds,
            "measures": {measure.key: measure.title for measure in self.measures},
            "baseline": self.recipe.baseline,
            "take_off_reward": self.recipe.take_off,
            "recipe": self.recipe.model_dump(mode="json"),
            "tuning": tuning,
            "arms": arms,
        }
