"""Running training and other commands from a demo: output into a file, training lines to the screen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "recipes" / "sft"
PROCESSES = 2

_console = Console(stderr=True, highlight=False)


def run(arguments: list[str], log: Path, *, threads: int | None = None) -> None:
    """A Python command whose training lines are shown, and whose whole output goes to a file."""
    threads = threads or os.cpu_count() or 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    with (
        log.open("w", buffering=1) as file,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith("step "):
                _console.print(f"    {line.rstrip()}", style="dim", soft_wrap=True)
    if process.returncode:
        tail = "".join(log.read_text().splitlines(keepends=True)[-20:])
        raise SystemExit(f"{' '.join(arguments)}\nfailed; the end of {log}:\n{tail}")


def train(recipe: Path, output: Path, overrides: list[str], *, processes: int = PROCESSES) -> None:
    """torchrun -m pear_megatron.train."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, "-m", "pear_megatron.train", "--config", str(recipe), f"output_dir={output}"]
    run(
        [*command, *overrides],
        output.parent / f"{output.name}.log",
        threads=max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // processes),
    )


def command(output: Path, name: str, *arguments: str | Path) -> None:
    """A `pear-megatron` command, shown as it would be typed; what it says goes to output/NAME.log."""
    words = [name, *map(str, arguments)]
    announce(f"pear-megatron {' '.join(words)}")
    run(["-m", "pear_megatron.cli", *words], output / f"{name}.log")


def announce(text: str) -> None:
    """A heading of what comes next."""
    _console.print(f"[bold]==>[/bold] {text}")
