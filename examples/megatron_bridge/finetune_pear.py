"""Megatron-Bridge's recipe for Qwen3-30B-A3B with LoRA, trained with PEAR's loss (README.md beside it)."""

from __future__ import annotations

import argparse

from megatron.bridge.recipes.qwen import qwen3_30b_a3b_peft_config

from pear_megatron import PearConfig
from pear_megatron.adapters import bridge as pear
from pear_megatron.data import DataConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="scored trajectories")
    parser.add_argument(
        "--pretrained", required=True, help="Qwen3-30B-A3B as a checkpoint of Megatron-Bridge"
    )
    parser.add_argument(
        "--output", required=True, help="where checkpoints go; the same command continues there"
    )
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--variant", default="token", choices=["token", "block", "sequence", "none"])
    options = parser.parse_args()

    config = qwen3_30b_a3b_peft_config(peft_scheme="lora")
    config.checkpoint.pretrained_checkpoint = options.pretrained
    config.checkpoint.save = config.checkpoint.load = options.output
    config.train.train_iters = config.scheduler.lr_decay_iters = options.iterations
    # What PEAR needs of the recipe; finetune() says so, and why, where one of them is left out.
    config.dataset = None
    config.model.calculate_per_token_loss = True
    config.ddp.average_in_collective = False
    config.validation.eval_iters = 0
    pear.finetune(
        config,
        data=DataConfig(train=options.data, seq_length=config.model.seq_length),
        pear=PearConfig(variant=options.variant),
    )


if __name__ == "__main__":
    main()
