"""The whole output layer, hidden states to loss and both gradients: GEMMs included, with and without its logits.

    python benchmarks/output_layer.py --device cuda
    python benchmarks/output_layer.py --device cpu --tokens 512 --hidden 128 --columns 4096 --chunks 64 128

Compares whole logits (six bytes of traffic each), the four-byte scheme, chunks of tokens (row sums stored, reduced
twice, and in one sweep from the end) and other people's. Times, peak memory above the inputs, and the time of the
three GEMMs alone in the same run. Writes results/output_layer-<device>.json.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from experiments.output_variants import Variant, variants
from measure import copy_bandwidth, peak_bytes, save, time_ms
from peers import Case, Unavailable
from table import print_record
from torch import Tensor

from pear_megatron.megatron import cpu

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--hidden", type=int, default=2048, help="size of the hidden states")
    parser.add_argument(
        "--columns", type=int, nargs="+", default=[38016, 152064], help="Qwen's at TP 4 and 1"
    )
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens of a chunk")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--only", nargs="+", help="names, or parts of names, of what to run")
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each number")
    parser.add_argument("--name", default="output_layer", help="of the result file")
    return parser.parse_args()


def gemms(hidden: Tensor, weight: Tensor) -> None:
    """The three matrix products that no way through the layer does without."""
    logits = hidden @ weight.t()
    torch.mm(logits, weight)
    torch.mm(logits.t(), hidden)


def measure(loss: Variant, hidden: Tensor, weight: Tensor, case: Case, seconds: float) -> dict[str, Any]:
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]

    def step(_: Any = None) -> None:
        torch.autograd.grad(loss(*leaves, case), leaves)

    ms = time_ms(hidden.device, lambda: None, step, seconds)
    value = float(loss(*leaves, case).detach())
    return {"ms": ms, "peak_bytes": peak_bytes(hidden.device, step), "loss": value}


def measure_shape(
    tokens: int, columns: int, args: argparse.Namespace, made: dict[str, Variant]
) -> list[dict[str, Any]]:
    """A row for the GEMMs alone and one for every variant."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    torch.manual_seed(0)
    hidden = torch.randn(tokens, args.hidden, device=device).to(dtype)
    weight = (torch.randn(columns, args.hidden, device=device) * (4 / args.hidden**0.5)).to(dtype)
    case = Case.random(tokens, columns, 0.0, device)
    shape = {"tokens": tokens, "hidden": args.hidden, "columns": columns, "dtype": args.dtype}
    shape["logits_bytes"] = tokens * columns * hidden.element_size()

    def alone() -> dict[str, Any]:
        ms = time_ms(device, lambda: None, lambda _: gemms(hidden, weight), args.seconds)
        return {"ms": ms, "tflops": 6e-9 * tokens * columns * args.hidden / ms}

    ways = {"the three GEMMs alone": alone}
    for name, loss in made.items():
        ways[name] = functools.partial(measure, loss, hidden, weight, case, args.seconds)
    rows = []
    for name, way in ways.items():
        row = {**shape, "name": name}
        try:
            row |= way()
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        except Exception as error:  # a peer that breaks is a row, not the end of the run
            row["error"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
        rows.append(row)
        print(f"{tokens:6} x {columns:6}  {name:48}", row.get("ms") or row["error"], flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; try --device cpu with small --tokens, --hidden and --columns")
    cpu.enable()
    made, skipped = {}, {}
    for name, make in variants(args.chunks).items():
        if args.only and not any(part in name for part in args.only):
            continue
        try:
            made[name] = make(device)
        except (Unavailable, ImportError, OSError, RuntimeError) as reason:
            skipped[name] = str(reason).splitlines()[0]

    rows: list[dict[str, Any]] = []
    for tokens, columns in ((t, v) for t in args.tokens for v in args.columns):
        rows += measure_shape(tokens, columns, args, made)
    record = {"copy_bytes_per_second": copy_bandwidth(device), "rows": rows, "skipped": skipped}
    path = save(args.name, device, record)
    print_record(path)
    print(f"written to {Path(path)}")


if __name__ == "__main__":
    main()
