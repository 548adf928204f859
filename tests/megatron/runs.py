"""Real training runs: torchrun, the tiny recipe, trajectories made on the spot."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "recipes" / "sft" / "tiny.yaml"


def write_trajectories(
    path: Path, count: int = 40, *, longest: int = 60, seed: int = 0, logprob: float = -6.9
) -> Path:
    """Random token ids of the tiny recipe's vocabulary, log-probs just below ``logprob``, mixed rewards."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(count):
            tokens, prompt = rng.randint(8, longest), rng.randint(1, 5)
            mask = [0] * prompt + [1] * (tokens - prompt)
            row = {
                "id": f"trajectory-{i}",
                "input_ids": [rng.randrange(1000) for _ in range(tokens)],
                "loss_mask": mask,
                "behavior_logprobs": [logprob - 0.2 * rng.random() if m else 0.0 for m in mask],
                "reward": rng.choice([1.0, 1.0, 1.0, -0.5]),
            }
            file.write(json.dumps(row) + "\n")
    return path


def launch(
    processes: int, *overrides: str, config: Path = TINY, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """torchrun -m pear_megatron.train on a recipe; one process needs no torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else [])]
    command += ["-m", "pear_megatron.train", "--config", str(config), *overrides]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stderr[-6000:]}")
    return done


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(folder: Path, data: Path, processes: int, *overrides: str) -> list[dict[str, Any]]:
    """A run of six steps -> its metrics."""
    launch(processes, f"data.train={data}", f"output_dir={folder}", "train.max_steps=6", *overrides)
    return metrics(folder)
