"""What a KL from a stored top-k, the entropy and the weights' factors cost beside the NLL alone, on given logits.

    python benchmarks/token_losses.py --device cuda
    python benchmarks/token_losses.py --device cpu --dtype bf16 f32

The losses take turns in one run, in an order drawn anew for every round; the times are medians, and so are the
ratios, each of which compares two times of the same round. On a CPU they are processor times, summed over threads.
Writes results/token_losses-<device>.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import save
from peers import Case
from table import print_record

from pear_megatron import PearConfig, pear_loss

NLL = "pear_loss, NLL"


def losses(k: int) -> dict[str, PearConfig]:
    return {
        NLL: PearConfig(variant="none"),
        f"pear_loss, KL of {k}": PearConfig(variant="none", base_loss="kl"),
        f"pear_loss, KL of {k} and the rest": PearConfig(variant="none", base_loss="kl", kl_tail="bucket"),
        "pear_loss, NLL and entropy": PearConfig(variant="none", report_entropy=True),
        f"pear_loss, KL of {k} and entropy": PearConfig(variant="none", base_loss="kl", report_entropy=True),
        "pear_loss, DFT": PearConfig(variant="none", dft_power=1.0),
        "pear_loss, PEAR token": PearConfig(),
        "pear_loss, PEAR token, DFT and negatives that stop": PearConfig(dft_power=1.0, negative_floor=2.0),
    }


def random_topk(tokens: int, columns: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Different ids for each entry of a token, far apart as a real top-k's are, and log-probs that fall."""
    first = torch.randint(columns, (tokens, 1), device=device)
    steps = torch.arange(k, device=device) * (columns // k)
    logprobs = (2 * torch.randn(tokens, k, device=device)).log_softmax(-1) - 0.05
    return ((first + steps) % columns).int(), logprobs.sort(-1, descending=True).values.contiguous()


def seconds_of(device: torch.device, run: Callable[[], Any]) -> float:
    """On a CPU those of the processor, summed over threads: what else the machine does counts less."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    pristine: torch.Tensor, case: Case, topk: tuple[torch.Tensor, torch.Tensor], seconds: float
) -> dict[str, dict[str, float]]:
    """Loss -> milliseconds, and times the NLL."""
    leaf = pristine.clone().requires_grad_()
    configs = losses(topk[0].shape[1])
    reward = torch.linspace(-1, 1, len(case.cu_seqlens) - 1, device=pristine.device)

    def step(config: PearConfig) -> None:
        args = (leaf, case.target, case.behavior, case.mask, case.cu_seqlens, config)
        loss = pear_loss(*args, reward=reward, behavior_topk=topk, inplace_backward=True)[0]
        torch.autograd.grad(loss, leaf)

    rounds: list[dict[str, float]] = []
    begin = time.perf_counter()
    while len(rounds) < 7 or time.perf_counter() - begin < seconds:
        order = list(configs)
        random.shuffle(order)
        times = {}
        for name in order:
            with torch.no_grad():
                leaf.copy_(pristine)
            times[name] = seconds_of(pristine.device, lambda name=name: step(configs[name]))
        rounds.append(times)
    del rounds[:2]
    return {
        name: {
            "ms": 1e3 * statistics.median(times[name] for times in rounds),
            "times_nll": statistics.median(times[name] / times[NLL] for times in rounds),
        }
        for name in configs
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tokens", type=int, help="default: 8192 (cuda), 512 (cpu)")
    parser.add_argument("--columns", type=int, nargs="+", default=[38016, 152064])
    parser.add_argument("--dtype", choices=["bf16", "f32", "f16"], nargs="+", default=["bf16"])
    parser.add_argument("--k", type=int, default=64, help="entries of the top-k")
    parser.add_argument("--seconds", type=float, default=5.0, help="spent on each shape")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; try --device cpu")
    tokens = args.tokens or (8192 if args.device == "cuda" else 512)
    dtypes = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
    rows = []
    for dtype in args.dtype:
        for columns in args.columns:
            torch.manual_seed(0)
            pristine = 4 * torch.randn(tokens, columns, dtype=dtypes[dtype], device=device)
            case = Case.random(tokens, columns, 0.0, device)
            found = measure(pristine, case, random_topk(tokens, columns, args.k, device), args.seconds)
            shape = {"tokens": tokens, "columns": columns, "dtype": dtype}
            rows += [{"name": name, **shape, **numbers} for name, numbers in found.items()]
    print_record(save("token_losses", device, {"rows": rows}))


if __name__ == "__main__":
    main()
