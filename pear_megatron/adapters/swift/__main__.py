"""``megatron sft`` with PearMegatronSft in it."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Trains with the command line of ``megatron sft`` and PEAR's options; the first argument may be its YAML file."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as megatron sft does, before CUDA starts
    from swift.cli.main import parse_yaml_args

    from pear_megatron.adapters.swift.program import PearMegatronSft

    options = sys.argv[1:]
    parse_yaml_args(options)
    PearMegatronSft(options).main()


if __name__ == "__main__":
    main()
