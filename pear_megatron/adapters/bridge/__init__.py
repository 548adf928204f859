"""PEAR in Megatron-Bridge's own loop: its ``finetune()``, recipes, LoRA and checkpoints, on scored trajectories.

    from pear_megatron.adapters import bridge as pear

    pear.finetune(config, data=DataConfig(train="scored.parquet", seq_length=2048), pear=PearConfig())

examples/megatron_bridge/finetune_pear.py is that program whole; docs/adapters/megatron_bridge.md says what was run.
"""

from pear_megatron.adapters.bridge.loop import finetune, plug_in

__all__ = ["finetune", "plug_in"]
