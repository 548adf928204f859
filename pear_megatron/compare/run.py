"""run_comparison: prepares, tunes, runs every cell, as many at once as asked for; continues what it finds."""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import zip_longest
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from pear_megatron.compare import stages, workers
from pear_megatron.compare.cell import Cell, all_cells, cells_of, fill, tuning_cells
from pear_megatron.compare.checks import (
    check_data,
    check_packages,
    check_recipe,
    check_seed,
    prepare_makes_the_model,
)
from pear_megatron.compare.disk import check_disk, drop
from pear_megatron.compare.outcome import CellResult, read_cell
from pear_megatron.compare.recipe import CompareRecipe
from pear_megatron.errors import PearError, RecipeError
from pear_megatron.progress import Progress
from pear_megatron.storage import lock, show_bytes, write_atomically

_PREPARED = "prepared.json"
_DONE = "done.json"


@dataclass
class Comparison:
    """A comparison being run.

    Args:
        recipe: what to run.
        jobs: cells at once; None = as many as there are cores for, one where there is a GPU.
        on_seed: called with the results so far each time a seed is complete.
    """

    recipe: CompareRecipe
    jobs: int | None = None
    on_seed: Callable[[list[CellResult], dict[str, tuple[str, ...]]], object] | None = None
    chosen: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _running: set[ForkServerProcess] = field(default_factory=set)
    _found: set[str] = field(default_factory=set)  # names of what was done before
    _freed: list[int] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> list[CellResult]:
        """Every cell -> their results, seed by seed.

        Raises:
            PearError: a recipe cannot be used, before anything is run; or cells failed, after the others are done:
                names each with the end of its log.
        """
        check_packages()
        check_recipe(self.recipe, prepared=False)
        self._count_cores()
        workers.preload()
        later = prepare_makes_the_model(self.recipe)
        if not later:
            self._check_disk()
        seeds = [*self.recipe.seeds, *([self.recipe.tune.seed] if self.recipe.tune else [])]
        if self.recipe.prepare:
            self._in_parallel("prepare", seeds, self._prepare, lambda seed: f"seed {seed}")
            check_recipe(self.recipe, prepared=True)
        check_data(self._unfinished())
        if later:
            self._check_disk()
        if tuning := tuning_cells(self.recipe):
            tried = [cell for by_value in tuning.values() for cell in by_value.values()]
            self._in_parallel("tune", tried, self._run_cell, lambda cell: cell.name)
            self.chosen = self._choose(tuning)
        cells = cells_of(self.recipe, self.chosen)
        results = self._in_parallel("compare", cells, self._run_cell, lambda cell: cell.name, self._seed_done)
        if freed := sum(self._freed):
            print(
                f"dropped {show_bytes(freed)} that nothing reads again: checkpoints and prepared data of "
                "finished cells, models of tuning (keep: all keeps them)",
                file=sys.stderr,
            )
        return results

    def _check_disk(self) -> None:
        if cells := self._unfinished():
            print(check_disk(cells, Path(self.recipe.output_dir), self.jobs or 1), file=sys.stderr)

    def _unfinished(self) -> list[Cell]:
        return [cell for cell in all_cells(self.recipe) if not (cell.folder / _DONE).is_file()]

    def _count_cores(self) -> None:
        import torch

        cores, ranks = len(os.sched_getaffinity(0)), self.recipe.offline.processes  # those we may use
        if self.jobs is None:
            self.jobs = 1 if torch.cuda.is_available() else max(1, cores // ranks)
        asked = os.environ.get("OMP_NUM_THREADS", "")
        most = max(1, int(asked)) if asked.isdigit() else cores
        self._threads = min(most, max(1, cores // (self.jobs * ranks)))
        self._threads_alone = min(most, max(1, cores // self.jobs))  # of a stage of one process

    def _prepare(self, seed: int) -> None:
        folder = self.recipe.prepared_root / f"seed{seed}"
        # Split first: a folder's name may hold spaces.
        commands = [fill(shlex.split(text), seed, folder) for text in self.recipe.prepare]
        marker = folder / _PREPARED
        with lock(folder):  # comparisons that share prepared_dir may be started together
            if not marker.is_file():
                stages.prepare(commands, folder / "prepare.log", self._threads)
                write_atomically(marker, json.dumps(commands, indent=1) + "\n")
                return
            self._found.add(f"seed {seed}")
            before = json.loads(marker.read_text(encoding="utf-8"))
            if before != commands:
                no_command: list[str] = []
                pairs = zip_longest(before, commands, fillvalue=no_command)
                old, new = next((" ".join(a), " ".join(b)) for a, b in pairs if a != b)
                raise RecipeError(
                    f"{folder} was prepared by other commands (`{old}`, now `{new}`); choose another folder, or "
                    "remove that one"
                )

    def _run_cell(self, cell: Cell) -> CellResult:
        cell.claim()
        done = cell.folder / _DONE
        if done.is_file():
            self._found.add(cell.name)
        else:
            started = time.monotonic()
            for name, function, arguments, ranks in stages.stages_of(cell):
                workers.run_stage(
                    function,
                    *arguments,
                    log=cell.folder / f"{name}.log",
                    threads=self._threads if name == stages.RUN else self._threads_alone,
                    ranks=ranks,
                    running=self._running,
                    stopped=self._stopped,
                )
            write_atomically(done, json.dumps({"seconds": round(time.monotonic() - started, 1)}) + "\n")
        self._freed.append(drop(cell))  # also where a kill came between the line above and this one
        return read_cell(cell)

    def _choose(self, tuning: dict[str, dict[float, Cell]]) -> dict[str, tuple[str, ...]]:
        """The value with the highest mean reward over RL, for each arm."""
        return {
            arm: max(by_value.values(), key=lambda cell: read_cell(cell).mean_reward).chosen
            for arm, by_value in tuning.items()
        }

    def _seed_done(self, results: list[CellResult]) -> None:
        """Called after each cell; acts when a seed is complete."""
        seeds = [seed for seed in self.recipe.seeds if self._of(results, seed)]
        last = results[-1].seed if results else None
        if last in seeds:
            check_seed(self.recipe, self._of(results, last))
            if self.on_seed is not None:
                self.on_seed([r for seed in seeds for r in self._of(results, seed)], self.chosen)

    def _of(self, results: list[CellResult], seed: Any) -> list[CellResult]:
        """The results of a seed, in the arms' order; none unless there are all."""
        by_arm = {result.arm: result for result in results if result.seed == seed}
        return [by_arm[arm] for arm in self.recipe.arms] if len(by_arm) == len(self.recipe.arms) else []

    def _in_parallel(
        self,
        title: str,
        items: Sequence[Any],
        work: Callable[[Any], Any],
        name: Callable[[Any], str],
        after: Callable[[list[Any]], None] = lambda done: None,
    ) -> list[Any]:
        """``work`` of every item -> what it returned, in the items' order; an error does not stop the others."""
        results: dict[int, Any] = {}
        finished: list[Any] = []
        errors: list[str] = []
        with Progress(title, len(items)) as progress, ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(work, item): i for i, item in enumerate(items)}
            try:
                for future in as_completed(futures):
                    i = futures[future]
                    try:
                        results[i] = future.result()
                    except PearError as error:
                        errors.append(f"{name(items[i])}: {error}")
                        progress.advance(f"{name(items[i])}: FAILED")
                        continue
                    finished.append(results[i])
                    found = name(items[i]) in self._found
                    progress.advance(f"{name(items[i])}{self._said(results[i])}", found=found)
                    after(finished)
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        if errors:
            raise PearError(
                f"{len(errors)} of {len(items)} failed; the same command runs those again:\n"
                + "\n".join(errors)
            )
        return [results[i] for i in range(len(items))]

    def _said(self, result: Any) -> str:
        return f": {result.summary(self.recipe)}" if isinstance(result, CellResult) else ""

    def _stop(self) -> None:
        self._stopped.set()
        for process in list(self._running):
            process.kill()
