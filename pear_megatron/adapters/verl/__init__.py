"""PEAR in verl's SFT trainer (docs/adapters/verl.md); read at verl's commit 1dda039b9.

    torchrun --nproc-per-node=8 -m pear_megatron.adapters.verl engine=megatron optim=megatron \\
        model.path=MODEL data.train_files=scored.jsonl data.max_length=8192 +pear.variant=token

Its settings are verl's ``sft_trainer_engine`` with ``pear`` (PearConfig) and ``data.pear`` (PearDataset) added.
"""
