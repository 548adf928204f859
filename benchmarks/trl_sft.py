"""The same SFT by transformers and TRL's SFTTrainer, for benchmarks/real_model.py: a process of its own.

    python benchmarks/trl_sft.py --model DIR --data dialogues.jsonl --steps 200 --output trl.json

Packed rows of fixed length (``packing_strategy="wrapped"``, no padding), float32 weights under bfloat16 autocast,
AdamW; every token is trained, prompts too, which costs the same. Writes tokens per second, medians of settled steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self.losses = device, [], []

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self.began)

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, type=Path, help="JSONL with messages")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()

    rows = [{"messages": json.loads(line)["messages"]} for line in args.data.read_text().splitlines()]
    clock = Clock(args.device)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=str(args.output.with_suffix("")),
            max_steps=args.steps,
            per_device_train_batch_size=args.rows,
            learning_rate=args.lr,
            max_length=args.seq_length,
            packing=True,
            packing_strategy="wrapped",
            bf16=args.device == "cuda",
            use_cpu=args.device == "cpu",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        callbacks=[clock],
    )
    trainer.train()
    settled = clock.seconds[min(10, len(clock.seconds) // 2) :]
    speed = args.rows * args.seq_length / statistics.median(settled)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
    record = {"tokens_per_second": speed, "nll": clock.losses[-1], "peak_bytes": peak}
    args.output.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
