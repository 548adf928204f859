"""StepProfile: what a few steps of a run spend their time on, for torch's and NVIDIA's viewers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pear_megatron.errors import RecipeError
from pear_megatron.megatron.layout import Layout
from pear_megatron.recipe import Recipe

log = logging.getLogger("pear_megatron")


class StepProfile:
    """``train.profile``: a trace of torch's profiler a rank, in ``output_dir/profile``.

    Under ``nsys profile --capture-range=cudaProfilerApi`` the steps are marked for that instead, with NVTX ranges:
    a GPU has one profiler at a time.

    Raises:
        RecipeError: there is no such rank or step.
    """

    def __init__(self, recipe: Recipe, layout: Layout, total_steps: int) -> None:
        settings = recipe.train.profile
        self.settings, self.rank = settings, layout.rank
        self.folder = Path(recipe.output_dir) / "profile"
        self._profiler: Any = None
        self._first = self._last = 0
        if settings is None:
            return
        if max(settings.ranks) >= layout.world_size:
            raise RecipeError(
                f"train.profile.ranks {settings.ranks}: there is no rank {max(settings.ranks)} among "
                f"{layout.world_size}; they count from 0"
            )
        if settings.start > total_steps:
            raise RecipeError(
                f"train.profile.start {settings.start} comes after the run's last step, {total_steps}; lower it"
            )
        self._wanted = layout.rank in settings.ranks
        self._cuda = layout.device.type == "cuda"
        self._nsys = self._cuda and "NSYS_PROFILING_SESSION_ID" in os.environ

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of a number, counted from 1."""
        settings = self.settings
        if settings is None or not self._wanted or not settings.start <= number <= settings.stop:
            yield
            return
        if not self._first:
            self._start(number)
        self._last = number
        mark = torch.cuda.nvtx.range if self._nsys else torch.profiler.record_function
        with mark(f"step {number}"):
            yield
        if number == settings.stop:
            self.close()

    def _start(self, number: int) -> None:
        self._first = number
        if self._nsys:
            torch.cuda.profiler.start()
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def close(self) -> None:
        """Ends it, and writes down what there is; also of a run that ends before ``stop``."""
        if not self._first:
            return
        first, self._first = self._first, 0
        if self._cuda:
            torch.cuda.synchronize()
        if self._nsys:
            torch.cuda.profiler.stop()
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = self.folder / f"rank{self.rank}_steps_{first}-{self._last}.json"
        partial = path.with_name(f".{path.name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # a run is worth more than its profile
            log.warning("the profile cannot be written to %s: %s", path, error)
        else:
            log.info("profile: %s; open it at https://ui.perfetto.dev", path)
