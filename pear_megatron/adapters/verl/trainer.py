"""PearSFTTrainer: verl's SFT trainer with PEAR's loss, report and data."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils import tensordict_utils

from pear_megatron.adapters.verl.loss import REPORT, PearSFTLoss, reduce_reports
from pear_megatron.adapters.verl.settings import (
    check_batches,
    check_settings,
    check_vocabulary,
    count_whole_tokens,
)
from pear_megatron.config import PearConfig
from pear_megatron.data.columns import REFERENCE, Columns, needs_behavior_logprobs, require_supported
from pear_megatron.loss import report_keys
from pear_megatron.report import WeightWatch


class PearSFTTrainer(SFTTrainer):
    """verl's SFT trainer with PEAR's loss, its report, and our dataset unless ``data.custom_cls`` names another.

    Args:
        config: verl's ``sft_trainer_engine`` with ``pear`` and ``data.pear``.

    Raises:
        RecipeError: a setting under which the loss would not be PEAR's; says which and why.
        pydantic.ValidationError: (a ``ValueError``) an unknown key or a bad value in ``pear``.
    """

    def __init__(self, config: DictConfig) -> None:
        settings: Any = OmegaConf.to_container(config.get("pear") or OmegaConf.create(), resolve=True)
        self.pear = PearConfig(**settings)
        require_supported(self.pear, "verl", carries=(REFERENCE,))
        self._watch, self._trained = WeightWatch(self.pear), 0
        with open_dict(config):
            if config.data.custom_cls.path is None:
                config.data.custom_cls.path = "pkg://pear_megatron.adapters.verl.data"
                config.data.custom_cls.name = "PearDataset"
            data = dict(config.data.get("pear") or {})
            needs = {
                "needs_logprobs": needs_behavior_logprobs(self.pear),
                REFERENCE: Columns.of(self.pear).reference_logprobs,
            }
            config.data.pear = needs | data
        super().__init__(config)

    def _build_config(self) -> None:
        super()._build_config()
        check_settings(self.config, self.engine_config)

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
        check_batches(self.global_batch_size, self.engine.get_data_parallel_size())
        super()._init_engine()
        check_vocabulary(self.engine, self.model_config.hf_config)
        count_whole_tokens(self.engine)

    def _report(self, metrics: dict[str, Any], *, training: bool) -> None:
        """Puts ratios of global sums where verl gathered the micro-batches' reports; warns of the weights."""
        report = reduce_reports(metrics.pop(REPORT), report_keys(self.pear))
        if training:
            self._trained += 1
            if self.engine.get_data_parallel_rank() == 0:
                self._watch({"step": self.resume_global_step + self._trained, **report})
        del report["loss"]  # verl's own, the same number
        kind = "train" if training else "val"
        metrics |= {name if "/" in name else f"{kind}/{name}": value for name, value in report.items()}
