"""Megatron-LM's own training loop with PEAR's loss: its arguments, and --pear-* for ours (README.md beside it)."""

from __future__ import annotations

import sys

import torch

if not torch.cuda.is_available():
    from pear_megatron.megatron import cpu

    cpu.enable_training()

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from pear_megatron.adapters import megatron_lm as pear
from pear_megatron.errors import PearError


def main() -> None:
    args = parse_and_validate_args(extra_args_provider=pear.add_arguments, args_defaults=pear.DEFAULTS)
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    try:
        pretrain(config, pear.datasets, ModelType.encoder_or_decoder, pear.forward_step(args))
    except PearError as error:
        sys.exit(f"error: {error}" if args.rank == 0 else 1)


if __name__ == "__main__":
    main()
