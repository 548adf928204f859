"""What the weights' factors cost: pear_loss with each, forward and backward, against NLL alone, in one run on the CPU.

    python benchmarks/factors.py --tokens 512 --columns 38016

A round runs NLL and every other setting once, in an order that turns; printed is the median over rounds of each one's
processor time over NLL's in the same round, which other work on the machine moves little.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from measure import hardware
from peers import Case

from pear_megatron import PearConfig, pear_loss
from pear_megatron.megatron import cpu

PLAIN = "NLL"
CONFIGS = {
    PLAIN: PearConfig(variant="none"),
    "NLL again": PearConfig(variant="none"),
    "DFT": PearConfig(variant="none", dft_power=1.0),
    "PEAR token": PearConfig(),
    "PEAR token, DFT and negatives that stop": PearConfig(dft_power=1.0, negative_floor=2.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--columns", type=int, default=38016)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    cpu.enable()
    torch.manual_seed(0)
    case = Case.random(args.tokens, args.columns, 0.0, torch.device("cpu"))
    pristine = (4 * torch.randn(args.tokens, args.columns)).bfloat16()
    leaf, reward = pristine.clone().requires_grad_(), torch.linspace(-1, 1, len(case.cu_seqlens) - 1)
    inputs = (case.target, case.behavior, case.mask, case.cu_seqlens)
    seconds: dict[str, list[float]] = {name: [] for name in CONFIGS}
    for number in range(args.rounds + 2):
        order = list(CONFIGS)[number % len(CONFIGS) :] + list(CONFIGS)[: number % len(CONFIGS)]
        for name in order:
            config = CONFIGS[name]
            with torch.no_grad():
                leaf.copy_(pristine)
            begin = time.process_time()
            loss, _, _ = pear_loss(leaf, *inputs, config, reward=reward, inplace_backward=True)
            torch.autograd.grad(loss, leaf)
            seconds[name].append(time.process_time() - begin)
    print(f"{hardware(torch.device('cpu'))}, torch {torch.__version__}; {args.tokens} x {args.columns} bf16")
    print("| | processor ms | over NLL |\n| --- | ---: | ---: |")
    for name, of_name in seconds.items():
        ratios = [mine / nll for mine, nll in zip(of_name[2:], seconds[PLAIN][2:], strict=True)]
        print(f"| {name} | {1e3 * statistics.median(of_name[2:]):.1f} | {statistics.median(ratios):.3f} |")


if __name__ == "__main__":
    main()
