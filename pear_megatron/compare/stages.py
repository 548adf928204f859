"""The stages of a cell: offline phase, export, evaluation, GRPO, evaluation; each continues what it finds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pear_megatron.compare.cell import RL_ENGINE, Cell
from pear_megatron.compare.workers import StageError
from pear_megatron.ranks import mortal
from pear_megatron.rl.engine import find_engine

RUN, EXPORT, BEFORE, RL, AFTER = "run", "export", "before", "rl", "after"


def stages_of(cell: Cell) -> list[tuple[str, Any, tuple[Any, ...], int | None]]:
    """What a cell does, in order: name, function, arguments, ranks (see ``workers.run_stage``)."""
    folder, recipe = cell.folder, cell.recipe
    start: Path = folder / EXPORT
    stages: list[tuple[str, Any, tuple[Any, ...], int | None]] = []
    if cell.has_offline_phase:
        arguments = ["--config", recipe.offline.recipe, *cell.offline_overrides]
        stages.append((RUN, train, (arguments,), recipe.offline.processes))
        stages.append((EXPORT, export, (folder / RUN, start), None))
    elif cell.offline.checkpoint.pretrained:
        stages.append((EXPORT, export, (Path(cell.offline.checkpoint.pretrained), start), None))
    elif cell.offline.model.hf:
        start = Path(cell.offline.model.hf)
    else:
        raise StageError(
            f"{cell.arm} has no offline phase, and the recipe names nothing to start from: give model.hf or "
            "checkpoint.pretrained"
        )
    grpo = (recipe.rl.recipe, cell.rl_overrides, start, folder / RL)
    if cell.evaluated:
        stages.append((BEFORE, evaluate, (cell, start, folder / BEFORE), None))
    stages.append((RL, reinforce, grpo, None))
    if cell.evaluated:
        stages.append((AFTER, evaluate, (cell, folder / RL / "final", folder / AFTER), None))
    return stages


def train(arguments: list[str]) -> None:
    """The offline phase, as ``python -m pear_megatron.train``."""
    from pear_megatron.train.__main__ import main

    main(arguments)


def export(checkpoint: Path, output: Path) -> None:
    """As ``pear-megatron export``."""
    from pear_megatron.megatron.checkpoint.export import export_checkpoint

    if not (output / "config.json").is_file():
        export_checkpoint(checkpoint, output)


def evaluate(cell: Cell, model: Path, output: Path) -> None:
    """As ``pear-megatron eval``; the same samples' seeds for every cell."""
    from pear_megatron.evaluate.run import evaluate as run
    from pear_megatron.problems.load import load_problems

    assert cell.rl.data.validation is not None
    settings = cell.recipe.eval
    run(
        model,
        load_problems(cell.rl.data.validation),
        output,
        ks=settings.k,
        batch_size=settings.batch_size,
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        max_new_tokens=cell.max_new_tokens,
        seed=cell.seed,
    )


def reinforce(recipe: str, overrides: list[str], checkpoint: Path, output: Path) -> None:
    """As ``pear-megatron grpo``."""
    find_engine(RL_ENGINE).run(Path(recipe), overrides, checkpoint, output)


def prepare(commands: list[list[str]], log: Path, threads: int) -> None:
    """Runs a seed's commands one after the other, their output into a log; StageError quotes its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        for command in commands:
            words = [sys.executable if word == "python" else word for word in command]
            print("$", *words, file=file, flush=True)
            if shutil.which(words[0]) is None:
                raise StageError(f"`{' '.join(command)}`: there is no program {words[0]}")
            done = subprocess.run(
                mortal(words), env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            )
            if done.returncode:
                tail = "\n".join(log.read_text(errors="replace", encoding="utf-8").splitlines()[-10:])
                raise StageError(
                    f"`{' '.join(command)}` failed (exit code {done.returncode}); {log} ends with:\n{tail}"
                )
