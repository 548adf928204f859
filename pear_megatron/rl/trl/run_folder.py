"""TrlRunFolder: an RL run's config.yaml, metrics.jsonl, checkpoints and progress."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from pear_megatron.errors import CheckpointError, RecipeError
from pear_megatron.megatron.checkpoint.paths import FILES, damaged_file, write_sizes
from pear_megatron.rl.trl.recipe import TrlRecipe
from pear_megatron.storage import (
    check_same_settings,
    digest,
    forget_steps_after,
    naming,
    read_settings,
    remove,
    write_atomically,
)
from pear_megatron.watch import said

log = logging.getLogger("pear_megatron")

# What may change when a run is continued; anything else makes it another run.
_MAY_CHANGE = ("grpo.max_num_steps", "checkpointing.", "policy.train_micro_batch_size", "policy.model_name")

# metrics.jsonl's names of what TRL logs.
_METRICS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "loss": "loss",
    "kl": "kl",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "truncated",
    "step_time": "seconds_per_update",
}

_FOR_TRAINING = ("optimizer.pt", "scheduler.pt")
_ONLY_FOR_TRAINING = (
    "optimizer.*",
    "scheduler.*",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    FILES,
)


class TrlRunFolder:
    """The folder of one run.

    Raises:
        RecipeError: it holds a run of another recipe or from another checkpoint; names the keys.
    """

    def __init__(self, folder: Path, recipe: TrlRecipe, weights: str) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.final = folder / "final"
        self._updates = recipe.updates_per_step
        described = {**recipe.model_dump(mode="json"), "weights": weights}
        path = folder / "config.yaml"
        if self._has_begun():
            if not path.exists():
                raise RecipeError(
                    f"--output {folder} holds a run and no config.yaml, so that nobody knows its settings; put the "
                    "run's config.yaml back, choose another --output, or remove that folder to start anew"
                )
            check_same_settings(
                f"--output {folder}",
                read_settings(path),
                described,
                may_change=_MAY_CHANGE,
                way_out="weights are the checkpoint's; choose another --output, or remove that folder to start anew",
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, yaml.safe_dump(described, sort_keys=False))

    def _has_begun(self) -> bool:
        metrics = self.folder / "metrics.jsonl"
        return any(self.checkpoints.glob("checkpoint-*")) or (metrics.exists() and metrics.stat().st_size > 0)

    def latest_checkpoint(self) -> tuple[Path | None, int]:
        """The newest whole checkpoint, and its step; newer ones, half-written or damaged, are removed.

        Raises:
            CheckpointError: there are checkpoints that were written to their end, and all are damaged.
        """
        newer, damaged = [], []
        for path in self._by_step():
            try:
                # the last that Trainer writes
                state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
                step = int(state["global_step"]) // self._updates
            except (OSError, ValueError, KeyError, TypeError):
                newer.append(path)
                continue
            missing = [f"{name} is missing" for name in _FOR_TRAINING if not (path / name).is_file()]
            problem = next(iter(missing), None) or damaged_file(path)
            if problem is None:
                break
            newer.append(path)
            damaged.append(f"{path} ({problem})")
        else:
            if damaged:
                raise CheckpointError(
                    f"no checkpoint under {self.checkpoints} is whole: {'; '.join(damaged)}; put one back, or remove "
                    f"{self.folder} to start anew"
                )
            path, step = None, 0
        for description in damaged:
            log.warning("skipping a damaged checkpoint: %s; going on from step %d", description, step)
        for one in newer:
            remove(one)
        return path, step

    def _by_step(self) -> list[Path]:
        """The checkpoints, the newest first, by their names: a clock may go back."""
        found = [path for path in self.checkpoints.glob("checkpoint-*") if path.name[11:].isdigit()]
        return sorted(found, key=lambda path: -int(path.name[11:]))

    def keep(self, count: int | None) -> None:
        """Removes all but the newest checkpoints."""
        for path in self._by_step()[count or sys.maxsize :]:
            remove(path)

    def forget_after(self, step: int) -> None:
        """Drops metrics of steps that will be taken again."""
        forget_steps_after(self.folder / "metrics.jsonl", step)

    def remove_final(self) -> None:
        """Removes the model of a shorter run, which is continued now."""
        remove(self.final)

    def make_final(self) -> Path:
        """The newest checkpoint without what only training needs: a Hugging Face folder, whole or not at all."""
        latest, _ = self.latest_checkpoint()
        if latest is not None and not self.final.exists():
            partial = self.folder / ".final.partial"
            remove(partial)
            shutil.copytree(latest, partial, ignore=shutil.ignore_patterns(*_ONLY_FOR_TRAINING))
            partial.rename(self.final)
        return self.final


class KeepLast(TrainerCallback):
    """Writes down the sizes of a new checkpoint's files, and removes old ones as ``checkpointing.keep_last`` says.

    Trainer's own way goes by the clock.
    """

    def __init__(self, folder: TrlRunFolder, count: int | None) -> None:
        self._folder, self._count = folder, count

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by Trainer, once a checkpoint is whole."""
        write_sizes(self._folder.checkpoints / f"checkpoint-{state.global_step}")
        self._folder.keep(self._count)


class WriteMetrics(TrainerCallback):
    """A line of metrics.jsonl and of progress a step.

    ``groups_with_advantage`` is the share of prompts whose responses did not all get the same reward: the
    others teach nothing. ``problems`` is a digest of what was asked: two runs with the same one asked the same.

    Args:
        folder, recipe: of the run.
        asked: the problems of the responses that were graded since the last line; emptied with each.
    """

    def __init__(self, folder: TrlRunFolder, recipe: TrlRecipe, asked: list[int]) -> None:
        self._asked = asked
        self._path = folder.folder / "metrics.jsonl"
        self._steps, self._updates = recipe.grpo.max_num_steps, recipe.updates_per_step
        self._taught = 0.0

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by Trainer."""
        if not self._taught:
            log.warning(
                "grpo: in no step did the responses to a prompt get different rewards, so that nothing was learned: is "
                "the grader right, and can the checkpoint answer any of the problems?"
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Called by Trainer."""
        if not logs or "reward" not in logs:  # the summary at the end
            return
        step = state.global_step // self._updates
        row = {"step": step} | {ours: logs[theirs] for theirs, ours in _METRICS.items() if theirs in logs}
        row["groups_with_advantage"] = 1.0 - logs["frac_reward_zero_std"]
        self._taught += row["groups_with_advantage"]
        row["problems"] = digest(self._asked)
        self._asked.clear()
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"step {step}/{self._steps}  reward {row['reward']:.3f}  groups with advantage "
            f"{row['groups_with_advantage']:.2f}  completion length {row['completion_length']:.1f}  "
            f"loss {row['loss']:.4f}",
            file=sys.stderr,
            flush=True,
        )
        said(f"grpo: {step} of {self._steps} steps are done")
