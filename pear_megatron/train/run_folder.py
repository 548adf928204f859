"""RunFolder: what a run leaves behind for people: config.yaml, metrics.jsonl, TensorBoard, W&B, progress."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pear_megatron.errors import CheckpointError
from pear_megatron.recipe import Recipe, RecipeError, to_yaml
from pear_megatron.storage import check_same_settings, forget_steps_after, read_settings, write_atomically
from pear_megatron.train.weights_and_biases import WandbLog
from pear_megatron.watch import now, said

log = logging.getLogger("pear_megatron")

# What may change when a run is continued; anything else makes it another run.
_MAY_CHANGE = (
    "output_dir",
    "parallel.",
    "checkpoint.",
    "cluster.",
    "logging.",
    "train.max_steps",
    "train.num_epochs",
    "train.log_interval",
    "train.micro_batch_size",
    "train.recompute_",
    "train.output_chunk_tokens",
    "train.attention",
    "train.check_alignment",
    "train.eval_interval",
    "train.profile",
    "optimizer.lr_decay_steps",
    "optimizer.use_precision_aware_optimizer",
    "optimizer.optimizer_cpu_offload",
    "optimizer.optimizer_offload_fraction",
    "data.cache_dir",
    # Where the same things lie now: DataPosition knows trajectories by their tokens, lora.yaml its base by a digest;
    # what config.json says is compared key by key.
    "data.train",
    "data.tokenizer",
    "data.chat_template",
    "model.hf",
    "data.validation",
)


def check_same_run(folder: Path, recipe: Recipe) -> None:
    """Refuses to continue a run with another recipe.

    Raises:
        RecipeError: names the keys that differ, or that none are known.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise RecipeError(
            f"{folder} holds checkpoints and no config.yaml, so that nobody knows under which settings they were "
            "trained; put the run's config.yaml beside them, or start from their weights: checkpoint.pretrained="
            f"{folder} and another output_dir"
        )
    check_same_settings(
        f"output_dir {folder}",
        _with_defaults(read_settings(path)),
        recipe.model_dump(mode="json"),
        may_change=_MAY_CHANGE,
        way_out="choose another output_dir (checkpoint.pretrained starts from this run's weights), or remove that "
        "folder to start anew",
    )


def _with_defaults(values: Any) -> Any:
    """The settings of a run, with the defaults of keys that were not there yet when it began."""
    try:
        return Recipe.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


class RunFolder:
    """Files and progress of one run; rank 0 holds it, the other ranks hold None."""

    def __init__(
        self, recipe: Recipe, *, start_step: int, total_steps: int, wandb: WandbLog | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(recipe.output_dir)
        self.log_interval = recipe.train.log_interval
        self.total_steps = total_steps
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.yaml", to_yaml(recipe))
        forget_steps_after(self.folder / "metrics.jsonl", start_step)
        self._metrics = (self.folder / "metrics.jsonl").open("ab", buffering=0)
        self._unwritten = b""
        self._tensorboard: Any = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start_step + 1)
        self._wandb = wandb
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._interactive = console.is_terminal
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, status="")
        self._progress.start()

    def log_step(self, metrics: dict[str, Any]) -> None:
        """Records one step everywhere."""
        step = metrics["step"]
        self._write(metrics)
        status = (
            f"loss {metrics['loss']:.4f}  grad norm {metrics['grad_norm']:.3f}  lr {metrics['lr']:.2e}  "
            f"weight {metrics['pear/weight']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        )
        if "mfu" in metrics:
            status += f"  MFU {metrics['mfu']:.1%}"
        self._progress.update(self._task, completed=step, status=status)
        if not self._interactive and (step % self.log_interval == 0 or step == self.total_steps):
            print(f"step {step}/{self.total_steps}  {status}", file=sys.stderr, flush=True)
            said()
        if "validation/loss" in metrics:
            self._show_evaluation(metrics)
        now(f"training: {step} of {self.total_steps} steps are done")

    def log_evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Records an evaluation that no step of training came before: a row of its own."""
        self._write({"step": step, **metrics})
        self._show_evaluation({"step": step, **metrics})

    def _show_evaluation(self, metrics: dict[str, Any]) -> None:
        figures = "  ".join(
            f"{name} {metrics[f'validation/{key}']:.4f}"
            for name, key in (("loss", "loss"), ("nll", "nll"), ("weight", "pear/weight"))
        )
        self._progress.console.print(
            f"step {metrics['step']}/{self.total_steps}  validation: {figures}",
            highlight=False,
            soft_wrap=True,
        )

    def _write(self, metrics: dict[str, Any]) -> None:
        """A row of metrics.jsonl, and its numbers to TensorBoard and W&B."""
        step = metrics["step"]
        self._append(json.dumps(metrics) + "\n")
        scalars = {
            name if "/" in name else f"train/{name}": value
            for name, value in metrics.items()
            if not isinstance(value, str) and name != "step"
        }
        try:
            for name, value in scalars.items() if self._tensorboard is not None else ():
                self._tensorboard.add_scalar(name, value, step)
        except OSError as error:
            self._tensorboard = None
            log.warning("TensorBoard's file cannot be written (%s): it ends before step %d", error, step)
        if self._wandb is not None:
            self._wandb.log(step, scalars)

    def _append(self, line: str) -> None:
        """A line of metrics.jsonl; while the disk takes none, it waits here: the state is in memory too."""
        waited = bool(self._unwritten)
        self._unwritten += line.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
        except OSError as error:
            if not waited:
                log.warning(
                    "%s cannot be written (%s): its rows wait in memory, and training goes on until a checkpoint "
                    "cannot be written either; make room there",
                    self._metrics.name,
                    error.strerror,
                )

    def close(self) -> None:
        """Ends the progress bar and flushes every file.

        Raises:
            CheckpointError: the last rows cannot be written, at the end of a run that did not fail otherwise.
        """
        self._progress.stop()
        self._append("")
        self._metrics.close()
        with suppress(OSError):
            if self._tensorboard is not None:
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close(failed=sys.exc_info()[0] is not None)
        if self._unwritten and sys.exc_info()[0] is None:
            rows = self._unwritten.count(b"\n")
            raise CheckpointError(
                f"{self._metrics.name} lacks its last {rows} rows, which the disk did not take; all is saved"
            )
