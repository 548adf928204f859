"""PearTrainer: torchtitan's Trainer under PEAR's loss; with_pear puts it into a config of torchtitan's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.components.validate import Validator
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from pear_megatron.adapters.batch_loss import require_same_loss
from pear_megatron.adapters.torchtitan.data import PREFIX, PearBatches
from pear_megatron.adapters.torchtitan.loss import PearLoss
from pear_megatron.config import PearConfig
from pear_megatron.data import DataConfig
from pear_megatron.errors import RecipeError
from pear_megatron.report import WeightWatch


def with_pear(config: Trainer.Config, *, pear: PearConfig, data: DataConfig) -> PearTrainer.Config:
    """A config of torchtitan's (``llama3_8b()``), trained with PEAR's loss on scored trajectories.

    Model, parallelism, optimizer, schedule, checkpoints and metrics stay the config's; its loss, data loader and
    validator give way. CUDA graphs are off: a batch has as many trajectories as fit.

    Args:
        config: torchtitan's, changed by nobody else afterwards but its command line.
        pear: how the loss is reweighted.
        data: the files. ``training.seq_len`` becomes its ``seq_length``; ``validation`` turns the validator on; without
            a ``tokenizer``, rows of text are read with that of ``hf_assets_path``.

    Raises:
        RecipeError: settings under which something else would be trained (again when the Trainer is made, with what
            the command line changed).
    """
    assert config.model_spec is not None
    vocab_size = decoder_vocab_size(config.model_spec)
    train, held_out = data.model_copy(update={"validation": None}), data.validation
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    found = PearTrainer.Config(
        **given
        | {
            "loss": PearLoss.Config(pear=pear, vocab_size=vocab_size),
            "dataloader": PearBatches.Config(data=train, pear=pear, vocab_size=vocab_size),
            "training": dataclasses.replace(
                config.training, seq_len=data.seq_length, disable_cuda_graphs=True
            ),
        }
    )
    if held_out is not None:
        found.validator = PearValidator.Config(
            enable=True,
            freq=config.validator.freq,
            dataloader=PearBatches.Config(
                data=train.model_copy(update={"train": held_out}),
                pear=pear,
                vocab_size=vocab_size,
                infinite=False,
            ),
        )
    check(found)
    return found


class PearTrainer(Trainer):
    """torchtitan's Trainer under PEAR's loss.

    Metrics have ``nll`` and ``pear/...``, validation's ``validation_metrics/nll`` and so on: ratios of sums over all
    ranks since the last log.

    Raises:
        RecipeError: settings under which something else would be trained.
        CheckpointError: a checkpoint to go on from was trained under another loss.
    """

    loss_fn: PearLoss

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """As with_pear makes it."""

    def __init__(self, config: Config) -> None:
        check(config)
        for _, batches, _, _ in config.traverse(PearBatches.Config):
            batches.pear = config.loss.pear
            batches.global_batch_size, batches.seed = (
                config.training.global_batch_size,
                config.debug.seed or 0,
            )
            if batches.data.tokenizer is None:
                batches.data = batches.data.model_copy(update={"tokenizer": config.hf_assets_path})
        super().__init__(config)
        self._watch = WeightWatch(config.loss.pear)
        self.metrics_processor.log = self._with_report(self.metrics_processor.log, training=True)
        self.metrics_processor.log_validation = self._with_report(
            self.metrics_processor.log_validation, training=False
        )

    def _with_report(self, log: Callable[..., None], *, training: bool) -> Callable[..., None]:
        loss_mesh, tp_mesh = (self.parallel_dims.get_optional_mesh(name) for name in ("loss", "tp"))
        group = None if loss_mesh is None else loss_mesh.get_group()
        place = "" if training else "validation_metrics/"
        speaks = all(mesh is None or mesh.get_local_rank() == 0 for mesh in (loss_mesh, tp_mesh))

        def log_with_report(*args: Any, extra_metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
            means = self.loss_fn.batch_loss.means(training=training, group=group)
            named = {place + name: value for name, value in means.items()}
            log(*args, extra_metrics={**(extra_metrics or {}), **named}, **kwargs)
            if means and speaks:
                logger.info("  ".join(f"{name}: {value:.4g}" for name, value in named.items()))
                if training:
                    self._watch({"step": self.step, **means})

        return log_with_report

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """torchtitan's, without the tensors that are the loss's."""
        batch, rest = _apart(input_dict)
        inputs, labels, extra_kwargs = super().post_dataloading_process(rest, labels)
        if not self.parallel_dims.pp_enabled or self.pp_has_last_stage:
            self.loss_fn.remember(labels, batch)
        return inputs, labels, extra_kwargs

    def train_step(self, data_iterator: Any) -> None:
        """torchtitan's."""
        super().train_step(data_iterator)
        self.loss_fn.require_no_batch_left()

    def state_dict(self) -> dict[str, Any]:
        """torchtitan's, and the loss."""
        return {**super().state_dict(), "pear": self.loss_fn.batch_loss.pear.model_dump_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torchtitan's; another loss is refused."""
        super().load_state_dict(state_dict)
        now = self.loss_fn.batch_loss.pear.model_dump(mode="json")
        require_same_loss(json.loads(state_dict["pear"]), now, otherwise=" (checkpoint.initial_load_path)")


class PearValidator(Validator):
    """torchtitan's Validator under PEAR's loss, over held-out trajectories."""

    loss_fn: PearLoss

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        """As with_pear makes it."""

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor, model_parts: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """torchtitan's, without the tensors that are the loss's."""
        batch, rest = _apart(input_dict)
        inputs, labels, extra_kwargs = super().post_dataloading_process(rest, labels, model_parts)
        if not self.parallel_dims.pp_enabled or self.pp_has_last_stage:
            self.loss_fn.remember(labels, batch)
        return inputs, labels, extra_kwargs

    def validate(self, model_parts: Any, step: int) -> None:
        """torchtitan's."""
        super().validate(model_parts, step)
        self.loss_fn.require_no_batch_left()


def _apart(input_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The loss's tensors, and the others."""
    ours = [name for name in input_dict if name.startswith(PREFIX)]
    batch = {name.removeprefix(PREFIX): input_dict[name] for name in ours}
    return batch, {name: value for name, value in input_dict.items() if name not in ours}


def check(config: Any) -> None:
    """Refuses settings under which something else would be trained.

    Raises:
        RecipeError: names them all, with the way out.
    """
    parallelism, found = config.parallelism, []
    for setting, name, wanted, why in (
        (config.loss, "loss", PearLoss.Config, "the loss is PEAR's"),
        (config.dataloader, "dataloader", PearBatches.Config, "the loss needs scored trajectories"),
    ):
        if not isinstance(setting, wanted):
            found.append(f"{name} is {type(setting).__qualname__}: {why}; make the config with with_pear")
    if config.validator.enable and not isinstance(config.validator, PearValidator.Config):
        found.append("validator.enable without held-out trajectories; give DataConfig's validation")
    if not config.training.disable_cuda_graphs:
        found.append(
            "training.disable_cuda_graphs is false: a batch has as many trajectories as fit; leave it true"
        )
    if parallelism.context_parallel_degree > 1:
        found.append(
            "parallelism.context_parallel_degree: trajectories split over ranks are known to "
            "python -m pear_megatron.train alone; set it to 1"
        )
    tp = parallelism.tensor_parallel_degree
    if isinstance(config.loss, PearLoss.Config) and config.loss.vocab_size % tp:
        found.append(
            f"parallelism.tensor_parallel_degree {tp} does not divide the vocabulary of {config.loss.vocab_size}; use "
            "one that does"
        )
    if parallelism.spmd_backend != "spmd_types":
        found.append(f"parallelism.spmd_backend {parallelism.spmd_backend} was not checked; use spmd_types")
    if found:
        raise RecipeError("; ".join(found))
