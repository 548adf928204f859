"""torchtitan: its own Trainer under PEAR's loss, on scored trajectories. docs/adapters/torchtitan.md."""

from pear_megatron.adapters.torchtitan.trainer import PearTrainer, with_pear

__all__ = ["PearTrainer", "with_pear"]
