"""verl's ``sft_trainer`` program with PearSFTTrainer in it."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig
from verl.utils.device import auto_set_device
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from pear_megatron.adapters.verl.trainer import PearSFTTrainer


@hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None)
def main(config: DictConfig) -> None:
    """Trains with verl's ``sft_trainer_engine``, ``pear`` and ``data.pear``."""
    auto_set_device(config)
    initialize_global_process_group()
    PearSFTTrainer(config).fit()
    destroy_global_process_group()


if __name__ == "__main__":
    main()
