"""What stands for the data in Megatron-Bridge's configuration, and in the one that it saves with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.bridge.data.base import DatasetProvider

from pear_megatron.errors import RecipeError


@dataclass(kw_only=True)
class PearTrajectories(DatasetProvider):
    """A dataset config whose iterators Bridge takes as they are (``dataloader_type="external"``).

    Attributes:
        files: the scored trajectories.
        seq_length: positions in a row.
        pear: the loss's settings as JSON.
    """

    files: list[str]
    seq_length: int
    pear: str
    dataloader_type: str = "external"
    num_workers: int = 0
    persistent_workers: bool = False

    def __post_init__(self) -> None:
        self._build: Callable[[Any], tuple[Any, Any]] | None = None

    def built_by(self, build: Callable[[Any], tuple[Any, Any]]) -> PearTrajectories:
        """``build``: process groups -> iterators for training and evaluation."""
        self._build = build
        return self

    def build_datasets(self, context: Any) -> tuple[Any, Any, None]:
        """What Bridge's loop asks for when model and checkpoint are there.

        Raises:
            RecipeError: this is a configuration read back from a checkpoint's folder.
        """
        if self._build is None:
            raise RecipeError(
                "this configuration comes from a saved file, which holds no data; set config.dataset = None and call "
                "pear_megatron.adapters.bridge.finetune"
            )
        return (*self._build(context.pg_collection), None)
