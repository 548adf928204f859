"""PEAR in verl's SFT trainer: ``torchrun -m pear_megatron.adapters.verl`` is its program with this loss and data.

    torchrun --nproc-per-node=8 -m pear_megatron.adapters.verl engine=megatron optim=megatron \\
        model.path=MODEL data.train_files=scored.jsonl +pear.variant=token

Its settings are verl's ``sft_trainer_engine`` with ``pear`` (PearConfig) and ``data.pear`` (PearDataset) added;
docs/adapters/verl.md.
"""

from __future__ import annotations

from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils import tensordict_utils
from verl.utils.device import auto_set_device
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from pear_megatron.adapters.verl_loss import REPORT, PearSFTLoss, reduce_reports
from pear_megatron.config import PearConfig
from pear_megatron.errors import RecipeError

ENGINES = ("megatron", "fsdp", "fsdp2")


class PearSFTTrainer(SFTTrainer):
    """verl's SFT trainer with PEAR's loss, its report, and our dataset unless ``data.custom_cls`` names another.

    Args:
        config: verl's ``sft_trainer_engine`` with ``pear`` and ``data.pear``.

    Raises:
        RecipeError: a setting under which the loss would not be PEAR's; says which and why.
        pydantic.ValidationError: (a ``ValueError``) an unknown key or a bad value in ``pear``.
    """

    def __init__(self, config: DictConfig) -> None:
        self.pear = PearConfig(**OmegaConf.to_container(config.get("pear") or OmegaConf.create(), resolve=True))
        self._steps = 0
        with open_dict(config):
            if config.data.custom_cls.path is None:
                config.data.custom_cls.path = "pkg://pear_megatron.adapters.verl_data"
                config.data.custom_cls.name = "PearDataset"
            data = dict(config.data.get("pear") or {})
            config.data.pear = {"needs_logprobs": self.pear.variant != "none", **data}
        super().__init__(config)

    def _build_config(self) -> None:
        super()._build_config()
        check(self.config, self.engine_config)

    def _build_engine(self) -> None:
        super()._build_engine()
        self.loss_fn = PearSFTLoss(self.pear)
        self.training_client.set_loss_fn(loss_fn=self.loss_fn)
        original = self.training_client._postprocess_output

        def with_report(output: Any, *, forward_only: bool, **arguments: Any) -> Any:
            result = original(output, forward_only=forward_only, **arguments)
            self._report(tensordict_utils.get(result, "metrics"), training=not forward_only)
            return result

        self.training_client._postprocess_output = with_report

    def _init_engine(self) -> None:
        dp_size = self.engine.get_data_parallel_size()
        if self.global_batch_size % dp_size:
            raise RecipeError(
                f"data.train_batch_size={self.global_batch_size} does not divide among {dp_size} data-parallel ranks; "
                "verl would train on fewer"
            )
        super()._init_engine()
        check_vocabulary(self.engine, self.model_config.hf_config)
        count_whole_tokens(self.engine)

    def _report(self, metrics: dict[str, Any], *, training: bool) -> None:
        """Puts ratios of global sums where verl gathered the micro-batches' reports."""
        report = reduce_reports(metrics.pop(REPORT))
        del report["loss"]  # verl's own, the same number
        kind = "train" if training else "val"
        metrics |= {name if "/" in name else f"{kind}/{name}": value for name, value in report.items()}


def check(config: DictConfig, engine_config: Any) -> None:
    """RecipeError where verl's settings break the loss."""
    if engine_config.strategy not in ENGINES:
        raise RecipeError(
            f"engine={engine_config.strategy}: how it scales a loss was not checked; use {', '.join(ENGINES)}"
        )
    if config.data.pad_mode != "no_padding":
        raise RecipeError(f"data.pad_mode={config.data.pad_mode}: the loss reads data.pad_mode=no_padding")
    if getattr(engine_config, "dynamic_context_parallel", False):
        raise RecipeError(
            "engine.dynamic_context_parallel: its scheduler moves samples between ranks, which was not checked for "
            "PEAR's columns; use engine.context_parallel_size"
        )
    if config.model.get("custom_chat_template") and not config.data.pear.get("chat_template"):
        raise RecipeError(
            "model.custom_chat_template: PEAR's dataset reads the template from a file; give it as "
            "+data.pear.chat_template=FILE too"
        )


def check_vocabulary(engine: Any, hf_config: Any) -> None:
    """RecipeError where a Megatron model has padded columns: verl's log-probs count them as tokens."""
    real = getattr(getattr(hf_config, "text_config", hf_config), "vocab_size", None)
    for chunk in engine.module if isinstance(engine.module, list) else ():
        while hasattr(chunk, "module"):
            chunk = chunk.module
        columns = getattr(chunk, "vocab_size", real)
        if columns != real:
            raise RecipeError(
                f"the model's output layer has {columns} columns for {real} tokens; verl's log-probs have the padding in "
                "their softmax. Choose a tensor-parallel size that divides the vocabulary"
            )


def count_whole_tokens(engine: Any) -> None:
    """Makes the gradient exact where verl's Megatron engine rounds a micro-batch's tokens down to a multiple of CP.

    Under ``calculate_per_token_loss`` (which Megatron-Bridge sets with context parallelism) the engine multiplies the
    loss by a number of tokens and has each rank tell Megatron its share of them to divide by, ``tokens // cp_size``.
    Counting every token cp_size times leaves no remainder. Experts' auxiliary losses and multi-token prediction are
    scaled by the same number, so with those it stays as verl has it.
    """
    config, cp_size = getattr(engine, "tf_config", None), getattr(engine.engine_config, "context_parallel_size", 1)
    if cp_size == 1 or config is None or not config.calculate_per_token_loss:
        return
    if config.num_moe_experts or getattr(config, "mtp_num_layers", None):
        return
    original = engine._routed_num_tokens
    engine._routed_num_tokens = lambda data: original(data) * cp_size


@hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None)
def main(config: DictConfig) -> None:
    """verl's ``sft_trainer`` program with this trainer."""
    auto_set_device(config)
    initialize_global_process_group()
    PearSFTTrainer(config).fit()
    destroy_global_process_group()


if __name__ == "__main__":
    main()
