"""How long the commands take to answer: --help of each, and a recipe with a misspelt key.

python benchmarks/cli.py [--repeat 5]

Wall time is that of the fastest run: what the command takes on an idle machine. Processor time hardly depends on what
else runs. The first row is the interpreter's own start.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import save
from table import print_record

CLI = ("-m", "pear_megatron.cli")


def answers(folder: Path) -> dict[str, tuple[tuple[str, ...], int]]:
    """Name -> (arguments of the interpreter, the exit code that is right)."""
    from pear_megatron.cli import app

    bad = folder / "bad.yaml"
    bad.write_text("output_dir: x\nseedz: 1\n")
    commands = [str(command.name) for command in app.registered_commands]
    return {
        "python": (("-c", "pass"), 0),
        "--help": ((*CLI, "--help"), 0),
        **{f"{name} --help": ((*CLI, name, "--help"), 0) for name in commands},
        "plan, misspelt key": ((*CLI, "plan", "--config", str(bad)), 1),
        "compare, misspelt key": ((*CLI, "compare", "--config", str(bad)), 1),
        "train, misspelt key": (("-m", "pear_megatron.train", "--config", str(bad)), 1),
    }


def run(arguments: tuple[str, ...], code: int) -> tuple[float, float]:
    """(wall time, processor time) in milliseconds."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1e3 * wall, 1e3 * used


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--name", default="cli", help="of the JSON in results/")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (arguments, code) in answers(Path(folder)).items():
            run(arguments, code)  # fills the caches of files and of compiled modules
            wall, used = zip(*(run(arguments, code) for _ in range(args.repeat)), strict=True)
            rows.append({"name": name, "ms": min(wall), "processor_ms": min(used)})
    path = save(args.name, torch.device("cpu"), {"rows": rows})
    print_record(path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
