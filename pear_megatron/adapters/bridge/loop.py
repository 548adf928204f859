"""What Megatron-Bridge's loop is given: the forward step, the data, two callbacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pear_megatron.adapters.bridge.checks import check, packed_attention
from pear_megatron.adapters.offline_data import OfflineBatches, open_trajectories
from pear_megatron.config import PearConfig
from pear_megatron.data import DataConfig
from pear_megatron.data.columns import Columns, needs_behavior_logprobs
from pear_megatron.errors import RecipeError
from pear_megatron.megatron.forward_step import PearForwardStep
from pear_megatron.report import WeightWatch

log = logging.getLogger("pear_megatron")


def finetune(
    config: Any,
    *,
    data: DataConfig,
    pear: PearConfig,
    validation_data: str | list[str] | None = None,
    callbacks: Any = None,
) -> None:
    """``megatron.bridge.training.finetune.finetune`` with PEAR's loss and data.

    Args:
        config: Bridge's ConfigContainer; its ``dataset`` is None, and becomes ours.
        data: the trajectories; ``seq_length`` is ``config.model.seq_length``.
        pear: how the loss is reweighted.
        validation_data: files of held-out trajectories, for ``config.validation.eval_iters``.
        callbacks: for Bridge's loop, as its own ``finetune`` takes them; ours comes first.

    Raises:
        RecipeError: what in the configuration does not go with the loss or the data, all of it, with the way out.
        DataError: what is wrong with the files, by file and line.
    """
    try:
        from megatron.bridge.training.callbacks import CallbackManager
        from megatron.bridge.training.finetune import finetune as finetune_of_bridge
    except ImportError as error:
        raise RecipeError(
            f"Megatron-Bridge does not import here ({error}); install megatron-bridge and what it needs "
            "(docs/adapters/megatron_bridge.md)"
        ) from error
    step, source, watcher = plug_in(config, data=data, pear=pear, validation_data=validation_data)
    config.dataset = source
    if isinstance(callbacks, CallbackManager):
        manager = callbacks
    else:
        manager = CallbackManager()
        manager.add(list(callbacks or []))
    manager.register("on_data_init_start", watcher.on_data_init_start)
    manager.register("on_train_step_end", watcher.on_train_step_end)
    finetune_of_bridge(config, step, callbacks=manager)


def plug_in(
    config: Any, *, data: DataConfig, pear: PearConfig, validation_data: str | list[str] | None = None
) -> tuple[PearForwardStep, Any, Watcher]:
    """The parts that ``finetune`` hands to Bridge: forward step, dataset config, callback.

    Args, raises: see ``finetune``.
    """
    if config.dataset is not None:
        raise RecipeError(
            f"config.dataset is a {type(config.dataset).__name__}, which would not be read: the trajectories come "
            "from data=; set config.dataset = None"
        )
    validation = [validation_data] if isinstance(validation_data, str) else validation_data
    check(config, data, validation)
    # The size of the vocabulary is known when Bridge has built the tokenizer: Watcher sets it.
    step = PearForwardStep(
        pear, vocab_size=0, packed_attention=packed_attention(config), check_alignment=True
    )
    plan = _Plan(data, pear, validation)
    return step, _dataset_config(plan), Watcher(step, plan)


@dataclass
class _Plan:
    """What the data set config needs when Bridge builds its iterators; ``config`` and ``consumed`` come last."""

    data: DataConfig
    pear: PearConfig
    validation: list[str] | None
    config: Any = None
    consumed: int = 0
    groups: Any = None

    def build(self, groups: Any) -> tuple[OfflineBatches, OfflineBatches | None]:
        """This rank's micro-batches for training and, if the configuration evaluates, for evaluation."""
        if self.config is None:
            raise RecipeError(
                "this Megatron-Bridge builds its data before it fires on_data_init_start, so that nobody says where "
                "a resumed run starts; use Megatron-Bridge 0.6.2 or newer"
            )
        self.groups = groups
        train, validation = self.config.train, self.config.validation
        batches = self._batches(
            groups,
            self.data.train_files,
            train.global_batch_size,
            train.micro_batch_size,
            consumed_samples=self.consumed,
        )
        if torch.distributed.get_rank() == 0:
            batches.announce(train.train_iters)
        if not validation.eval_iters or self.validation is None:
            return batches, None
        sizes = validation.eval_global_batch_size, validation.eval_micro_batch_size
        return batches, self._batches(groups, self.validation, *sizes, period=validation.eval_iters)

    def _batches(
        self, groups: Any, files: Sequence[str], global_size: int, micro_size: int, **options: Any
    ) -> OfflineBatches:
        data = self.data.model_copy(update={"train": list(files)})
        return OfflineBatches(
            open_trajectories(
                data,
                needs_logprobs=needs_behavior_logprobs(self.pear),
                vocab_size=self.config.model.vocab_size,
                columns=Columns.of(self.pear),
            ),
            seq_length=data.seq_length,
            global_batch_size=global_size,
            micro_batch_size=micro_size,
            dp_rank=groups.dp.rank(),
            dp_size=groups.dp.size(),
            cp_rank=groups.cp.rank(),
            cp_size=groups.cp.size(),
            seed=self.config.rng.seed,
            device=torch.device(torch.cuda.current_device()),
            **options,
        )


def _dataset_config(plan: _Plan) -> Any:
    from pear_megatron.adapters.bridge.dataset import PearTrajectories

    data = plan.data
    described = PearTrajectories(
        files=data.train_files, seq_length=data.seq_length, pear=plan.pear.model_dump_json()
    )
    return described.built_by(plan.build)


def keep_warnings() -> None:
    """Takes Bridge's filter off our loggers: ``logger.filter_warnings``, on by default, drops every warning."""
    from megatron.bridge.training.utils.log_utils import warning_filter

    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == log.name:
            logging.getLogger(name).removeFilter(warning_filter)


class Watcher:
    """What happens at two events of Bridge's loop: before its data are opened, and after a step.

    Args:
        step: the forward step, which gets its vocabulary's size.
        plan: gets the configuration as Bridge completed it, and the rows that were consumed before.
    """

    def __init__(self, step: PearForwardStep, plan: _Plan) -> None:
        self._step, self._plan = step, plan
        self._watch = WeightWatch(plan.pear, "iteration {}")

    def on_data_init_start(self, context: Any) -> None:
        """Model and checkpoint are there: the configuration is complete, and it is known where the run starts.

        Raises:
            RecipeError: what precision, overlap and model made of the configuration does not go with the loss.
        """
        keep_warnings()
        config = context.state.cfg
        check(config, self._plan.data, self._plan.validation)
        self._step.vocab_size = config.model.vocab_size
        self._plan.config, self._plan.consumed = config, context.state.train_state.consumed_train_samples

    def on_train_step_end(self, context: Any) -> None:
        """Warns of weights that collapse or grow; the step's means are on the last pipeline stage."""
        groups = self._plan.groups
        speaks = all(group.rank() == 0 for group in (groups.dp, groups.tp, groups.cp))
        if not speaks or not context.loss_dict or context.skipped_iter:
            return
        means = {name: float(value) for name, value in context.loss_dict.items()}
        number = context.state.train_state.step + 1  # Bridge counts the step after this event
        self._watch({"step": number, "decisions": means["loss"] == means["loss"], **means})
