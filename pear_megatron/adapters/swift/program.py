"""PearMegatronSft: ``megatron sft`` with PEAR's options and scored trajectories."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, make_dataclass
from typing import Any

from swift.megatron.arguments import MegatronSftArguments
from swift.megatron.pipelines.train.sft import MegatronSft
from swift.megatron.utils import get_padding_to

from pear_megatron.adapters.offline_data import open_trajectories
from pear_megatron.adapters.swift.settings import (
    check_completed,
    check_options,
    data_config,
    option_fields,
    pear_config,
)
from pear_megatron.adapters.swift.trainer import PackedRows, PearMegatronTrainer
from pear_megatron.data.columns import Columns, needs_behavior_logprobs

_Options: Any = make_dataclass("_Options", option_fields(), bases=(MegatronSftArguments,))


@dataclass
class PearSftArguments(_Options):
    """``megatron sft``'s arguments with PEAR's.

    Raises:
        RecipeError: options that would be ignored or train something else; a bad ``--pear_...``.
        CheckpointError: the checkpoint to go on from was trained under another loss.
    """

    def __post_init__(self) -> None:
        check_options(self)
        pear_config(self)
        super().__post_init__()
        cp_size = self.context_parallel_size
        check_completed(self, math.lcm(get_padding_to(self) or 1, 2 * cp_size if cp_size > 1 else 1))

    def init_iters(self, train_dataset: Any, val_dataset: Any) -> None:
        """ms-swift's; epochs are whole ones, whose rows, packed anew each time, may differ in number."""
        super().init_iters(train_dataset, val_dataset)
        if self.num_train_epochs is not None:
            self.train_iters = train_dataset.batches().plan.first_step(self.num_train_epochs)


def _show_warnings() -> None:
    """Gives our loggers a handler of their own: ms-swift lets those of other libraries say errors alone."""
    log = logging.getLogger("pear_megatron")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(levelname)s:%(name)s] %(message)s"))
        log.addHandler(handler)
        log.propagate = False


class PearMegatronSft(MegatronSft):
    """``megatron sft`` whose data are scored trajectories and whose loss is PEAR's.

    Args:
        args: a command line, as a list, or PearSftArguments.

    Raises:
        RecipeError: see PearSftArguments.
        DataError: when it runs: what is wrong with the files, by file and line.
    """

    args_class = PearSftArguments

    def __init__(self, args: Any = None) -> None:
        _show_warnings()
        super().__init__(args)

    def _prepare_dataset(self) -> tuple[PackedRows, PackedRows | None]:
        held_out = self._open(self.args.val_dataset) if self.args.val_dataset else None
        return self._open(self.args.dataset), held_out

    def _open(self, files: list[str]) -> PackedRows:
        args, pear = self.args, pear_config(self.args)
        trajectories = open_trajectories(
            data_config(args, files),
            needs_logprobs=needs_behavior_logprobs(pear),
            vocab_size=self.template.config.vocab_size,
            columns=Columns.of(pear),
        )
        return PackedRows(trajectories, args)

    def prepare_trainer(self) -> PearMegatronTrainer:
        """What trains."""
        return PearMegatronTrainer(self.args, self.template)
