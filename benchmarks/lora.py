"""LoRA against full training: SmolLM2-135M-Instruct on solved puzzles, the NLL of held-out ones on the way.

python benchmarks/lora.py --output results/lora [--steps 200]

Plain SFT, 200 steps of two rows of 128 tokens each, float32, one process; learning rates 1e-4 (full) and 1e-3 (LoRA of
rank 16 on all projections). Half an hour on two cores. What is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from measure import save
from table import print_record

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "full": ["optimizer.lr=1e-4"],
    "LoRA, rank 16": ["optimizer.lr=1e-3", "+lora.rank=16", "+lora.alpha=16"],
}


def prepare(output: Path) -> None:
    """The model's folder, 1773 solved puzzles, and 96 held-out ones, which are not among them."""
    from examples.puzzles import problems
    from examples.puzzles.smollm2 import make_folder

    output.mkdir(parents=True, exist_ok=True)
    make_folder(output / "smollm2")
    problems.write_dialogues(output / "train.jsonl", problems.training(2000), problems.held_out(96))
    problems.write_dialogues(output / "heldout.jsonl", problems.held_out(96), problems.training(1))


def train(output: Path, name: str, steps: int) -> list[dict[str, float]]:
    """Runs or continues one run; its evaluations, a step and an NLL each."""
    folder = output / name.split(",")[0].lower()
    overrides = [
        *("pear.variant=none", f"model.hf={output / 'smollm2'}", f"output_dir={folder}"),
        *(f"data.train={output / 'train.jsonl'}", f"data.validation={output / 'heldout.jsonl'}"),
        *("parallel.tensor_model_parallel_size=1", "cluster.gpus_per_node=1", "train.global_batch_size=2"),
        *(f"train.max_steps={steps}", "train.eval_interval=50", "checkpoint.save_interval=50"),
        *("optimizer.lr_warmup_steps=10", *RUNS[name]),
    ]
    recipe = ROOT / "recipes" / "sft" / "puzzles.yaml"
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "-m",
        "pear_megatron.train",
        "--config",
        str(recipe),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, *command, *overrides], check=True, env=environment)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{"step": x["step"], "nll": x["validation/nll"]} for x in lines if "validation/nll" in x]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "lora", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    prepare(args.output.resolve())
    rows = [{"name": name, "evaluations": train(args.output.resolve(), name, args.steps)} for name in RUNS]
    path = save("lora", torch.device("cpu"), {"rows": rows})
    print_record(path)


if __name__ == "__main__":
    main()
