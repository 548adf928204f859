"""DataPosition: what the order of the data follows from; with the step, it is where a run stands in them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pear_megatron.data import AnyDataset, DataConfig, TrajectoryBlend, padding_multiple
from pear_megatron.errors import CheckpointError
from pear_megatron.megatron.layout import Layout
from pear_megatron.recipe import Recipe

# Field -> the recipe's key, as an error names it.
_KEYS = {
    "seed": "seed",
    "trajectories": "data.train",
    "fingerprint": "data.train",
    "global_batch_size": "train.global_batch_size",
    "seq_length": "data.seq_length",
    "packing": "data.packing",
    "blend": "data.train's weights",
}


@dataclass(frozen=True)
class DataPosition:
    """Arguments of BatchPlan, with a fingerprint in place of the data.

    Attributes:
        trajectories, fingerprint: number of the trajectories, and a digest of them.
        blend: what sources with weights are drawn by: ``by``, and each one's number of trajectories and weight; None =
            every trajectory counts once an epoch.
        multiple: every trajectory's positions are padded to a multiple of this: 2 x the context-parallel
            size that the run began with. A resumed run keeps it, so that its rows stay those of the run.
    """

    seed: int
    trajectories: int
    fingerprint: str
    global_batch_size: int
    seq_length: int
    packing: bool
    multiple: int
    blend: dict[str, Any] | None = None

    @classmethod
    def of(cls, recipe: Recipe, dataset: AnyDataset, layout: Layout) -> DataPosition:
        """Of a run that begins now."""
        return cls(
            seed=recipe.seed,
            trajectories=len(dataset),
            fingerprint=dataset.fingerprint(),
            global_batch_size=recipe.train.global_batch_size,
            seq_length=recipe.data.seq_length,
            packing=recipe.data.packing,
            multiple=padding_multiple(layout.cp_size),
            blend=_weights(recipe.data, dataset),
        )

    def resumed(self, saved: dict[str, Any]) -> DataPosition:
        """The position with which the run of a checkpoint goes on, where this one would begin it.

        Raises:
            CheckpointError: the run would see other batches than it would have; names the keys.
        """
        here = asdict(self)
        changed = [
            f"{_KEYS[field]} ({field} {saved.get(field)} then, {here[field]} now)"
            for field in _KEYS
            if saved.get(field) != here[field]
        ]
        if changed:
            raise CheckpointError(
                f"the run cannot go on: its batches follow from {', '.join(changed)}; put back what was there, "
                "or begin another run with checkpoint.pretrained and another output_dir"
            )
        if saved["multiple"] % self.multiple:
            raise CheckpointError(
                f"the run cannot go on: its rows pad trajectories to multiples of {saved['multiple']}, and "
                f"parallel.context_parallel_size {self.multiple // 2} needs {self.multiple}; resume it with a "
                "context_parallel_size that divides the one it began with"
            )
        return DataPosition(**(here | {"multiple": saved["multiple"]}))


def _weights(config: DataConfig, dataset: AnyDataset) -> dict[str, Any] | None:
    if not isinstance(dataset, TrajectoryBlend) or config.train_sources[0].weight is None:
        return None
    sizes = [len(one) for one in dataset.datasets]
    weights = [source.weight for source in config.train_sources]
    return {"by": config.blend_by, "sizes": sizes, "weights": weights}
