"""The loss on given logits: ours against Megatron-Core's and other people's, same inputs, one run.

    python benchmarks/logprob.py --device cuda
    python benchmarks/logprob.py --device cpu --tokens 512 --columns 19008 38016

Forward, backward and both, with a weight per token (measure.time_ms); what a copy reaches in the same run; peak
memory above the inputs. Writes results/logprob-<device>.json, which table.py turns into a table of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measure import copy_bandwidth, peak_bytes, save, time_ms
from peers import LOSSES, Case, Loss, Unavailable
from table import print_record

from pear_megatron.megatron import cpu

COLUMNS = [19008, 38016, 76032, 152064, 262144]  # Qwen's vocabulary at TP 8, 4, 2, 1; Gemma's


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 8192 16384 (cuda), 512 (cpu)")
    parser.add_argument(
        "--columns", type=int, nargs="+", help=f"default: {COLUMNS} (cuda), up to 152064 (cpu)"
    )
    parser.add_argument("--dtype", choices=["bf16", "f32", "f16"], nargs="+", default=["bf16"])
    parser.add_argument(
        "--masked", type=float, nargs="+", default=[0.0, 0.5], help="share of tokens off the mask"
    )
    parser.add_argument("--only", nargs="+", help="names, or parts of names, of what to run")
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each number")
    parser.add_argument("--name", default="logprob", help="of the result file")
    return parser.parse_args()


def floor_bytes(logits: torch.Tensor, case: Case, direction: str) -> int:
    """What must move through memory: wanted rows read once, and in backward every row written once."""
    row = logits.shape[1] * logits.element_size()
    read, written = int(case.mask.sum()) * row, logits.shape[0] * row
    return {"forward": read, "backward": read + written, "both": 2 * read + written}[direction]


def measure(loss: Loss, pristine: torch.Tensor, case: Case, seconds: float) -> dict[str, Any]:
    """Milliseconds by direction, the peak memory of a forward and backward, and the loss."""
    device = pristine.device
    leaf = pristine.clone().requires_grad_()

    def fresh() -> torch.Tensor:
        with torch.no_grad():
            leaf.copy_(pristine)  # some write over the logits
        return leaf

    def backward(value: torch.Tensor) -> None:
        torch.autograd.grad(value, leaf)

    ms = {
        "forward": time_ms(device, fresh, lambda logits: loss(logits, case), seconds),
        "backward": time_ms(device, lambda: loss(fresh(), case), backward, seconds),
        "both": time_ms(device, fresh, lambda logits: backward(loss(logits, case)), seconds),
    }
    fresh()
    peak = peak_bytes(device, lambda: backward(loss(leaf, case)))
    return {"ms": ms, "peak_bytes": peak, "loss": float(loss(fresh(), case))}


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; try --device cpu")
    cpu.enable()
    on_gpu = device.type == "cuda"
    tokens = args.tokens or ([8192, 16384] if on_gpu else [512])
    columns = args.columns or (COLUMNS if on_gpu else [19008, 38016, 152064])
    dtypes = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}

    losses, skipped = {}, {}
    for name, make in LOSSES.items():
        if args.only and not any(part in name for part in args.only):
            continue
        try:
            losses[name] = make(device)
        except (Unavailable, ImportError, OSError, RuntimeError) as reason:
            skipped[name] = str(reason).splitlines()[0]

    copy = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    shapes = [(t, v, d, m) for d in args.dtype for t in tokens for v in columns for m in args.masked]
    for T, V, dtype, masked in shapes:
        torch.manual_seed(0)
        pristine = (4 * torch.randn(T, V, dtype=dtypes[dtype], device=device)).contiguous()
        case = Case.random(T, V, masked, device)
        floors = {d: floor_bytes(pristine, case, d) for d in ("forward", "backward", "both")}
        for name, loss in losses.items():
            row = {"name": name, "tokens": T, "columns": V, "dtype": dtype, "masked": masked}
            try:
                row |= measure(loss, pristine, case, args.seconds)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            except Exception as error:  # a peer that breaks is a row, not the end of the run
                row["error"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            else:
                row["floor_bytes"] = floors
                row["share_of_copy"] = {d: floors[d] / copy / (1e-3 * row["ms"][d]) for d in floors}
                row["peak_share_of_logits"] = row["peak_bytes"] / pristine.nbytes
            rows.append(row)
            print(
                f"{T:6} x {V:6} {dtype} masked {masked:.0%}  {name:26}",
                row.get("ms") or row["error"],
                flush=True,
            )
            if on_gpu:
                torch.cuda.empty_cache()
        del pristine
    record = {"copy_bytes_per_second": copy, "rows": rows, "skipped": skipped}
    path = save(args.name, device, record)
    print_record(path)
    print(f"written to {Path(path)}")


if __name__ == "__main__":
    main()
