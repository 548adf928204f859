"""PEAR in Megatron-SWIFT's ``megatron sft`` (docs/adapters/swift.md); read at ms-swift 4.6.0 and mcore-bridge 1.6.5.

    torchrun --nproc-per-node=8 -m pear_megatron.adapters.swift --model MODEL --dataset scored.parquet \\
        --packing true --max_length 8192 --tensor_model_parallel_size 2 --pear_variant token

Its options are ``megatron sft``'s, with PearConfig's fields (``--pear_...``) beside them.
"""
