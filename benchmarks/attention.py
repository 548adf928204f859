"""Attention over a packed row: under a mask, over its segments (train.attention=varlen), and Transformer Engine's.

    python benchmarks/attention.py --device cpu
    python benchmarks/attention.py --device cuda --heads 32 --groups 8 --head-size 128

The core attention of one layer, forward and backward, on a row of four trajectories of equal length; each entry in a
process of its own. Memory is the growth of the peak: of what the process has resident on the CPU, of what torch has
allocated on a GPU. Writes results/attention-<device>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import save, single_process_group
from table import print_record

NAMES = {"mask": "mask", "varlen": "varlen", "transformer_engine": "Transformer Engine"}
_SEGMENTS = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--groups", type=int, default=1, help="key-value heads")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["bf16", "f32"], help="default: f32 on the CPU, bf16 on a GPU")
    parser.add_argument("--limit-gb", type=float, default=14, help="of a process's data on the CPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each time")
    parser.add_argument("--one", nargs=2, metavar=("PATH", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("f32" if args.device == "cpu" else "bf16")
    return args


def core_attention(path: str, args: argparse.Namespace) -> Any:
    """mcore's module for a layer of these heads."""
    from pear_megatron.megatron import cpu

    cpu.enable()
    single_process_group(torch.device(args.device))
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from pear_megatron.megatron.core_attention import VarlenAttention

    bf16 = args.dtype == "bf16"
    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.heads * args.head_size,
        num_attention_heads=args.heads,
        num_query_groups=args.groups,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    if path == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention(config, 1, AttnMaskType.padding_causal, "self")
    return {"mask": DotProductAttention, "varlen": VarlenAttention}[path](
        config, 1, AttnMaskType.causal, "self"
    )


def peak(device: torch.device) -> int:
    """Bytes held at once, at most, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def median_ms(device: torch.device, run: Callable[[], None], seconds: float) -> float:
    """Of as many runs as fit, after the first: one at least, which under a mask may take half a minute."""
    samples: list[float] = []
    while not samples or (sum(samples) < 1e3 * seconds and len(samples) < 100):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(samples)


def measure(path: str, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds and bytes of one forward and backward pass."""
    device = torch.device(args.device)
    if device.type == "cpu":
        limit = int(args.limit_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    module = core_attention(path, args)
    from megatron.core.packed_seq_params import PackedSeqParams

    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    leaves = [
        torch.randn(tokens, heads, args.head_size, dtype=dtype, device=device, requires_grad=True)
        for heads in (args.heads, args.groups, args.groups)
    ]
    length = tokens // _SEGMENTS
    ends = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=length, max_seqlen_kv=length)

    def run() -> None:
        if path == "mask":
            segment = torch.arange(tokens, device=device) // length
            mask = (segment[:, None] != segment) | ~torch.ones(
                tokens, tokens, dtype=torch.bool, device=device
            ).tril()
            out = module(*(x[:, None] for x in leaves), mask[None, None])
        else:
            out = module(*leaves, None, packed_seq_params=packed)
        out.backward(torch.ones_like(out))
        for leaf in leaves:
            leaf.grad = None

    before = peak(device)
    try:
        run()
        bytes_ = peak(device) - before
        return {"ms": median_ms(device, run, args.seconds), "peak_bytes": bytes_}
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error) and "memory" not in str(error):
            raise
        return {"error": "out of memory"}


def in_its_own_process(path: str, tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", *sys.argv, "--one", path, str(tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{path} at {tokens} tokens ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; try --device cpu")
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args)))
        return
    from pear_megatron.megatron.attention import transformer_engine_available

    paths, skipped = ["mask", "varlen"], {}
    if args.device == "cuda" and args.dtype == "bf16" and transformer_engine_available():
        paths.append("transformer_engine")
    else:
        skipped["Transformer Engine"] = "needs a GPU, the package and bf16"
    rows = []
    for tokens in args.tokens:
        for path in paths:
            rows.append({"name": NAMES[path], "tokens": tokens, **in_its_own_process(path, tokens)})
            print(rows[-1], flush=True)
    shape = f"{args.heads} query heads and {args.groups} key-value heads of {args.head_size}, {args.dtype}"
    record = {
        "model": f"{shape}; {_SEGMENTS} trajectories in a row",
        "limit_gb": args.limit_gb if args.device == "cpu" else None,
        "rows": rows,
        "skipped": skipped,
    }
    written = save("attention", torch.device(args.device), record)
    print_record(written)
    print(f"written to {written}")


if __name__ == "__main__":
    main()
