"""A whole training step on one device, with Megatron's loss, ours without weights, and ours with PEAR.

    python benchmarks/step.py --device cuda --tokens 4096 8192
    python benchmarks/step.py --device cpu --model tiny --tokens 256

Forward, loss, backward, gradient clipping and AdamW of a GPT built by Megatron-Core, through its own
schedules, DDP and optimizer, on random tokens. Writes results/step-<device>.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import peak_bytes, save, time_ms
from table import print_step
from torch import Tensor

from pear_megatron import PearConfig
from pear_megatron.data.batches import PackedBatch
from pear_megatron.data.config import DataConfig
from pear_megatron.megatron.forward_step import LossOutput, PearForwardStep
from pear_megatron.megatron.layout import initialize, packed_attention, shutdown
from pear_megatron.megatron.model import build_model, unwrap, wrap_ddp
from pear_megatron.megatron.optimizer import build_optimizer
from pear_megatron.recipe import ModelConfig, OptimizerConfig, Recipe, TrainConfig

COMMON: dict[str, Any] = {"max_position_embeddings": 131072, "share_embeddings_and_output_weights": True}
MODELS = {
    "tiny": ModelConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=8000, **COMMON
    ),
    # Sizes of Qwen2.5-0.5B and Llama-3.2-1B.
    "0.5b": ModelConfig(
        num_layers=24,
        hidden_size=896,
        ffn_hidden_size=4864,
        num_attention_heads=14,
        num_query_groups=2,
        vocab_size=151936,
        **COMMON,
    ),
    "1b": ModelConfig(
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=128256,
        **COMMON,
    ),
}


class MegatronLoss(PearForwardStep):
    """Plain SFT as Megatron does it: the model computes the loss of every token from ``labels``."""

    def __call__(
        self, data_iterator: Iterator[PackedBatch], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], LossOutput]]:
        batch = next(data_iterator)
        inputs = self._inputs(batch)
        labels = batch.labels.clamp_min(0).view(inputs["input_ids"].shape)

        def loss(per_token: Tensor) -> LossOutput:
            mask = batch.loss_mask.view(-1)
            total = torch.dot(per_token.float().view(-1), mask.float())
            return total, mask.sum(dtype=torch.int32), {}

        return model(**inputs, labels=labels), loss


def forward_steps(vocab_size: int, tp_group: Any, precision: str) -> dict[str, tuple[PearForwardStep, bool]]:
    """Name -> (what Megatron's schedule calls, whether Megatron's fused cross entropy is on)."""
    attention = packed_attention(precision)
    common = {"vocab_size": vocab_size, "tp_group": tp_group, "packed_attention": attention}
    return {
        "Megatron-Core": (MegatronLoss(PearConfig(variant="none"), **common), False),
        "Megatron-Core, fused": (MegatronLoss(PearConfig(variant="none"), **common), True),
        "ours, variant none": (PearForwardStep(PearConfig(variant="none"), **common), False),
        "ours, PEAR token": (PearForwardStep(PearConfig(), **common), False),
        "ours, PEAR block": (PearForwardStep(PearConfig(variant="block"), **common), False),
    }


def random_batch(tokens: int, vocab_size: int, device: torch.device) -> PackedBatch:
    """One row of four trajectories, of which the first quarter is prompt."""
    length = tokens // 4
    labels = torch.randint(vocab_size, (1, tokens))
    mask = (torch.arange(tokens) % length >= length // 4).view(1, -1)
    batch = PackedBatch(
        tokens=torch.randint(vocab_size, (1, tokens)),
        labels=labels.where(mask, -100),
        loss_mask=mask,
        behavior_logprobs=(-12 - torch.rand(1, tokens)).where(mask, 0.0),
        position_ids=(torch.arange(tokens) % length).view(1, -1),
        cu_seqlens=torch.arange(0, tokens + 1, length, dtype=torch.int32),
        reward=torch.ones(4),
        trajectory_index=torch.arange(4),
        max_seqlen=length,
    )
    return batch.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", choices=list(MODELS), default="1b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192], help="of a micro-batch")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each number")
    parser.add_argument("--name", default="step", help="of the result file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; try --device cpu --model tiny")

    model_config = MODELS[args.model]
    recipe = Recipe(
        output_dir="unused",
        model=model_config,
        train=TrainConfig(global_batch_size=1, precision=args.precision),
        optimizer=OptimizerConfig(lr=1e-6),
        data=DataConfig.model_construct(seq_length=max(args.tokens)),
    )
    layout = initialize(recipe.model, recipe.parallel, recipe.train)
    from megatron.core.pipeline_parallel import get_forward_backward_func

    torch.manual_seed(0)
    model = wrap_ddp(build_model(model_config, layout, recipe.train), recipe.parallel)
    optimizer = build_optimizer(recipe, model)
    forward_backward = get_forward_backward_func()
    steps = forward_steps(model_config.vocab_size, layout.tp_group, args.precision)

    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        batch = random_batch(tokens, model_config.vocab_size, layout.device)
        for name, (forward_step, fused) in steps.items():
            unwrap(model).config.cross_entropy_loss_fusion = fused

            def train_step(forward_step: PearForwardStep = forward_step, tokens: int = tokens) -> None:
                model.zero_grad_buffer()
                optimizer.zero_grad()
                forward_backward(
                    forward_step_func=forward_step,
                    data_iterator=iter([batch]),  # noqa: B023  (run before the next batch is made)
                    model=[model],
                    num_microbatches=1,
                    seq_length=tokens,
                    micro_batch_size=1,
                    forward_only=False,
                )
                optimizer.step()

            row: dict[str, Any] = {"name": name, "tokens": tokens}
            try:
                row["ms"] = time_ms(layout.device, lambda: None, lambda _: train_step(), args.seconds)
                row["peak_bytes"] = peak_bytes(layout.device, train_step)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
                if layout.device.type == "cuda":
                    torch.cuda.empty_cache()
            rows.append(row)
            print(f"{tokens:6} tokens  {name:22}", row.get("ms") or row["error"], flush=True)
    what = f"{args.model} ({sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters), {args.precision}"
    path = save(args.name, layout.device, {"model": what, "rows": rows})
    print_step(path)
    print(f"written to {path}")
    shutdown()


if __name__ == "__main__":
    main()
