"""A whole training step on one device: Megatron's loss, ours without weights, with PEAR, and in chunks.

    python benchmarks/step.py --device cuda --model 1b --tokens 4096 8192 32768
    python benchmarks/step.py --device cuda --model 1b --recompute --longest
    python benchmarks/step.py --device cpu --model tiny --tokens 256 --chunk-tokens 64 --longest --longest-limit 1024

Forward, loss, backward, gradient clipping and AdamW of a GPT built by Megatron-Core, through its own schedules, DDP
and optimizer, on random tokens. --longest looks for the longest sequence whose step fits into memory, by doubling
and halving. Writes results/step-<model>-<device>.json.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch
from measure import peak_bytes, save, time_ms
from steps import MODELS, forward_steps, random_batch
from table import print_record

from pear_megatron.data.config import DataConfig
from pear_megatron.megatron.attention import attention_path
from pear_megatron.megatron.forward_step import PearForwardStep
from pear_megatron.megatron.layout import initialize, shutdown
from pear_megatron.megatron.model import build_model, unwrap, wrap_ddp
from pear_megatron.megatron.optimizer import build_optimizer
from pear_megatron.megatron.output_chunks import supports_output_processor
from pear_megatron.recipe import OptimizerConfig, Recipe, TrainConfig

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", choices=list(MODELS), default="1b")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192], help="of a micro-batch")
    parser.add_argument("--chunk-tokens", type=int, default=2048, help="of the chunked output layer")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--recompute", action="store_true", help="full activation recomputation")
    parser.add_argument("--longest", action="store_true", help="look for the longest sequence that fits")
    parser.add_argument("--longest-limit", type=int, default=1 << 18, help="tokens (default: 262144)")
    parser.add_argument(
        "--longest-seconds", type=float, default=60, help="spent on one loss's search (default: 60)"
    )
    parser.add_argument("--only", nargs="+", help="names, or parts of names, of what to run")
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each number")
    parser.add_argument("--name", help="of the result file (default: step-<model>)")
    return parser.parse_args()


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own error, or that of a library that found none left."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


class Steps:
    """A model on the device, and one training step of it with any of the losses."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = MODELS[args.model]
        recipe = Recipe(
            output_dir="unused",
            model=config,
            train=TrainConfig(
                global_batch_size=1, precision=args.precision, **(FULL if args.recompute else {})
            ),
            optimizer=OptimizerConfig(lr=1e-6),
            data=DataConfig(train=["unused"], seq_length=1),
        )
        self.layout = initialize(recipe.model, recipe.parallel, recipe.train)
        from megatron.core.pipeline_parallel import get_forward_backward_func

        torch.manual_seed(0)
        self.model = wrap_ddp(build_model(config, self.layout, recipe.train), recipe.parallel)
        self.attention = f"attention: {attention_path(recipe.train)}"
        self.model.train()
        self.optimizer = build_optimizer(recipe, self.model)
        self.forward_backward = get_forward_backward_func()
        self.vocab_size = config.vocab_size

    def run(self, forward_step: PearForwardStep, fused: bool, batch: Any) -> None:
        """One step."""
        unwrap(self.model).config.cross_entropy_loss_fusion = fused
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter([batch]),
            model=[self.model],
            num_microbatches=1,
            seq_length=batch.tokens.numel(),
            micro_batch_size=1,
            forward_only=False,
        )
        self.optimizer.step()

    def fits(self, forward_step: PearForwardStep, fused: bool, tokens: int) -> bool:
        """Whether a step of one sequence of so many tokens ends."""
        fitted = True
        try:
            self.run(forward_step, fused, random_batch(tokens, self.vocab_size, self.layout.device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fitted = False
        self.forget()
        return fitted

    def forget(self) -> None:
        """Gives back what an interrupted step held."""
        gc.collect()
        if self.layout.device.type == "cuda":
            torch.cuda.empty_cache()


def longest(
    steps: Steps, forward_step: PearForwardStep, fused: bool, unit: int, limit: int, seconds: float
) -> int:
    """The largest tried multiple of ``unit`` that fits: doubled until it does not, then halved in between."""
    deadline = time.perf_counter() + seconds
    good, bad = 0, limit // unit + 1
    trial = 1
    while bad - good > 1 and time.perf_counter() < deadline:
        if steps.fits(forward_step, fused, trial * unit):
            good = trial
        else:
            bad = trial
        trial = min(2 * good, bad - 1) if good and bad > limit // unit else (good + bad) // 2
    return good * unit


def main() -> None:
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; try --device cpu --model tiny")
    steps = Steps(args)
    device = steps.layout.device
    losses = forward_steps(steps.vocab_size, steps.layout.tp_group, args.chunk_tokens)
    if not supports_output_processor(steps.model):
        losses = {name: x for name, x in losses.items() if x[0].output_chunk_tokens is None}
        print("no chunks: this megatron-core has no output_processor (0.19+)", flush=True)
    if args.only:
        losses = {name: x for name, x in losses.items() if any(part in name for part in args.only)}

    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        batch = random_batch(tokens, steps.vocab_size, device)
        for name, loss in losses.items():
            row: dict[str, Any] = {"name": name, "tokens": tokens}

            def run(_: Any = None, loss: Any = loss, batch: Any = batch) -> None:
                steps.run(*loss, batch)

            try:
                row["ms"] = time_ms(device, lambda: None, run, args.seconds)
                row["peak_bytes"] = peak_bytes(device, run)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                row = {**row, "error": "out of memory"}
            steps.forget()
            rows.append(row)
            print(f"{tokens:6} tokens  {name:40}", row.get("error") or row["ms"], flush=True)
    record: dict[str, Any] = {"rows": rows}
    if args.longest:
        unit = 4096 if device.type == "cuda" else 256
        record |= {"longest_unit": unit, "longest_limit": args.longest_limit, "longest": {}}
        for name, loss in losses.items():
            found = longest(steps, *loss, unit, args.longest_limit, args.longest_seconds)
            record["longest"][name] = found
            print(f"longest sequence  {name:40}", found, flush=True)
    millions = sum(p.numel() for p in steps.model.parameters()) / 1e6
    recompute = ", full recomputation" if args.recompute else ""
    record["model"] = (
        f"{args.model} ({millions:.0f} M parameters), {args.precision}{recompute}; {steps.attention}"
    )
    path = save(args.name or f"step-{args.model}", device, record)
    print_record(path)
    print(f"written to {path}")
    shutdown()


if __name__ == "__main__":
    main()
