"""Sources: the data sets of ``data.train`` or ``data.validation``, each prepared on its own and opened as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from pear_megatron.data.blend import AnyDataset, Blend, TrajectoryBlend
from pear_megatron.data.columns import REFERENCE, TOPK_IDS
from pear_megatron.data.config import DataConfig, DataSource
from pear_megatron.data.errors import DataError
from pear_megatron.data.packing import BatchPlan
from pear_megatron.data.prepare import Reading, prepare
from pear_megatron.data.store import TrajectoryDataset
from pear_megatron.errors import RecipeError
from pear_megatron.ranks import from_main, patient_group, require_seen, together


def prepare_sources(
    config: DataConfig,
    sources: Sequence[DataSource],
    *,
    progress: bool = False,
    **reading: Unpack[Reading],
) -> list[Path]:
    """``prepare`` for each source -> their folders; an error names the source, where there are several."""
    folders: list[Path] = []
    for source in sources:
        try:
            own = config.model_copy(update={"train": source.path, "blend_by": "trajectories"})
            folders.append(prepare(own, progress=progress, **reading))
        except DataError as error:
            if len(sources) == 1:
                raise
            said = [f"source {source.name}: {problem}" for problem in error.problems]
            raise DataError(said, error.total, error.listed) from error
    return folders


def prepare_everywhere(
    config: DataConfig, sources: Sequence[DataSource], **reading: Unpack[Reading]
) -> AnyDataset:
    """Prepares the sources on rank 0 and opens them on every rank, which all call it; an error there is everyone's.

    Raises:
        DataError: what is wrong with the data, by file and line; or where they cannot be written.
        RecipeError: another node does not see what was prepared.
    """

    def work() -> list[Path]:
        try:
            return prepare_sources(config, sources, progress=True, **reading)
        except ImportError as error:
            raise DataError(str(error)) from error
        except OSError as error:
            where = config.cache_dir or "beside the data"
            raise DataError(
                f"{where}: the prepared data cannot be written ({error}); set data.cache_dir to another disk"
            ) from error

    folders = from_main(work, group=patient_group())

    def opened() -> AnyDataset:
        for folder in folders:
            require_seen(folder, f"data.cache_dir {folder.parent}")
        return open_sources(folders, sources)

    return together(opened)


def require_files(config: DataConfig) -> None:
    """RecipeError on what only this package's trainer reads: sources with names and weights, and held-out data."""
    if config.train != config.train_files:
        raise RecipeError(
            "data.train names sources, which only `python -m pear_megatron.train` blends; list their files"
        )
    if config.validation is not None:
        raise RecipeError(
            "data.validation would not be read here, only by `python -m pear_megatron.train`; leave it out"
        )


def open_sources(folders: Sequence[Path], sources: Sequence[DataSource]) -> AnyDataset:
    """The prepared folders as one set of trajectories; DataError where they do not go together."""
    datasets = [TrajectoryDataset.open(folder) for folder in folders]
    if len(datasets) == 1:
        return datasets[0]
    owner: dict[Path, str] = {}
    for source, dataset in zip(sources, datasets, strict=True):
        for file in dataset.meta["files"]:
            first = owner.setdefault(Path(file).resolve(), source.name)
            if first != source.name:
                raise DataError(
                    f"{file}: in source {first} and in source {source.name}; give it to one of them"
                )
    names = [source.name for source in sources]
    for column in (TOPK_IDS, REFERENCE):
        having = [dataset.has(column) for dataset in datasets]
        if any(having) and not all(having):
            has, lacks = names[having.index(True)], names[having.index(False)]
            raise DataError(
                f"{column} is in the rows of source {has} and not in those of source {lacks}; write it for both "
                "with `pear-megatron score`, or take it out of both"
            )
    return TrajectoryBlend(datasets, names)


def plan_batches(
    config: DataConfig, dataset: AnyDataset, *, global_batch_size: int, seed: int, multiple: int = 1
) -> BatchPlan:
    """BatchPlan of ``data.train``, whose weights draw from its sources; see there."""
    return BatchPlan(
        dataset.lengths,
        config.seq_length,
        global_batch_size,
        seed=seed,
        packing=config.packing,
        multiple=multiple,
        blend=blend_of(config, dataset),
    )


def blend_of(config: DataConfig, dataset: AnyDataset) -> Blend | None:
    """How ``data.train``'s weights draw from its sources; None where every trajectory counts once an epoch."""
    weights = [source.weight for source in config.train_sources if source.weight is not None]
    if not isinstance(dataset, TrajectoryBlend) or not weights:
        return None
    return Blend.of(weights, [d.lengths for d in dataset.datasets], by=config.blend_by)
