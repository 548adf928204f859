"""Checks: before anything is run, that all of it can be; after a seed, that its arms differ in nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from pear_megatron.compare import stages
from pear_megatron.compare.cell import Cell, all_cells
from pear_megatron.compare.outcome import CellResult, read_metrics
from pear_megatron.compare.recipe import CompareRecipe
from pear_megatron.config import PearConfig
from pear_megatron.data.columns import REFERENCE, TOPK_IDS, TOPK_LOGPROBS, Columns, needs_behavior_logprobs
from pear_megatron.data.errors import Problems
from pear_megatron.data.files import expand_files, read_rows
from pear_megatron.errors import PearError, RecipeError
from pear_megatron.recipe import ParallelConfig, check_layout
from pear_megatron.storage import differing_keys, read_settings

_BATCHES = ("data.", "train.global_batch_size", "train.num_epochs", "train.max_steps")


def check_packages() -> None:
    """PearError unless every package is there that a comparison needs before its end."""
    for package, extra in (("transformers", "hf"), ("trl", "rl"), ("scipy", "eval")):
        if find_spec(package) is None:
            raise PearError(f"compare needs {package}; pip install 'pear-megatron[{extra}]'")


def check_recipe(recipe: CompareRecipe, *, prepared: bool) -> None:
    """Every mistake in any arm's recipes that can be found before hours are spent.

    Once they are ``prepared``, a model.hf that ``prepare`` makes says what the model is.
    """
    later = prepare_makes_the_model(recipe)
    if prepared and not later:
        return
    for cell in all_cells(recipe):
        if cell.rl.data.validation is None:
            raise RecipeError(
                f"{recipe.rl.recipe} has no data.validation; add the problems that before and after ask"
            )
        _ = cell.max_new_tokens
        if prepared or not later:
            _check_cell(cell)


def prepare_makes_the_model(recipe: CompareRecipe) -> bool:
    """Whether the model is known only once ``prepare`` has run."""
    overrides = [*recipe.offline.overrides, *(text for own in recipe.arms.values() for text in own or [])]
    return any("model.hf" in text and "{prepared}" in text for text in overrides)


def _check_cell(cell: Cell) -> None:
    try:
        cell.describe()
        stages.stages_of(cell)
        if cell.has_offline_phase:
            offline = cell.offline
            _check_processes(offline.parallel, cell.recipe.offline.processes)
            check_layout(
                offline.model,
                offline.parallel,
                offline.train,
                cell.recipe.offline.processes,
                seq_length=offline.data.seq_length,
            )
    except PearError as error:
        raise RecipeError(f"arm {cell.name}: {error}") from error


def _check_processes(parallel: ParallelConfig, processes: int) -> None:
    """What ``check_layout`` would say of torchrun's --nproc-per-node, in a comparison's words."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    size = tp * pp * parallel.context_parallel_size
    if processes % size:
        raise RecipeError(
            f"offline.processes {processes} is no multiple of {size}, the product of parallel."
            f"tensor_model_parallel_size {tp}, pipeline_model_parallel_size {pp} and context_parallel_size "
            f"{parallel.context_parallel_size}; set offline.processes={size}, or the sizes to 1"
        )


def check_data(cells: Iterable[Cell]) -> None:
    """DataError unless the data of every arm have the columns that its loss reads, by each file's first row."""
    problems = Problems()
    for cell in cells:
        if not cell.has_offline_phase:
            continue
        for path in expand_files(cell.offline.data.train_files, problems):
            row = next(read_rows(path, problems, strict=False), None)
            for column, way_out in _columns(cell.offline.pear).items():
                if row is not None and column not in row.fields:
                    problems.add(row.where, f"arm {cell.arm} reads {column}, which is not there; {way_out}")
    problems.raise_if_any()


def _columns(pear: PearConfig) -> dict[str, str]:
    """The columns that a loss cannot do without, and where each comes from."""
    columns, read = {}, Columns.of(pear)
    if needs_behavior_logprobs(pear):
        columns["behavior_logprobs"] = "write them with `pear-megatron score` and the data's own policy"
    if read.reference_logprobs == "required":
        columns[REFERENCE] = "write them with `pear-megatron score --as reference`"
    if read.behavior_topk == "required":
        for name in (TOPK_IDS, TOPK_LOGPROBS):
            columns[name] = "write them with `pear-megatron score --top-k 64`"
    return columns


def check_seed(recipe: CompareRecipe, results: list[CellResult]) -> None:
    """Compares what the runs of a seed wrote down while they ran.

    The offline phases took the same trajectories in the same order, step by step, unless an arm's overrides ask
    for other data; RL asked the same problems in the same order under the same settings; the evaluations asked the
    same problems with the same random numbers.

    Raises:
        PearError: they did not; names the arms, the seed and the step.
    """
    cells = {result.arm: result.cell for result in results}
    first = cells[recipe.baseline]
    reference = next((c for c in (first, *cells.values()) if c.has_offline_phase and not other_data(c)), None)
    for cell in cells.values():
        if cell.has_offline_phase and not other_data(cell) and reference is not None:
            _same(reference, cell, stages.RUN, "trajectories")
        _same(first, cell, stages.RL, "problems")
        _same_settings(first, cell)


def other_data(cell: Cell) -> bool:
    """Whether the arm's own overrides give it other trajectories, or other batches of them."""
    own = cell.recipe.arms[cell.arm] or []
    return any(text.lstrip("+~").startswith(_BATCHES) for text in own)


def _same(first: Cell, second: Cell, stage: str, key: str) -> None:
    rows = [read_metrics(cell.folder / stage) for cell in (first, second)]
    seen = [[row[key] for row in part if key in row] for part in rows]  # not of evaluations alone
    if seen[0] == seen[1]:
        return
    pairs = zip(seen[0], seen[1], strict=False)
    step = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), min(map(len, seen)) + 1)
    raise PearError(
        f"{first.name} and {second.name} did not see the same {key}: {stage}/metrics.jsonl differ from step {step} "
        f"on ({len(seen[0])} and {len(seen[1])} steps); the arms cannot be compared"
    )


def _same_settings(first: Cell, second: Cell) -> None:
    def read(cell: Cell) -> dict[str, Any]:
        settings: dict[str, Any] = {"rl": read_settings(cell.folder / stages.RL / "config.yaml")}
        for name in (stages.BEFORE, stages.AFTER):
            settings[name] = read_settings(cell.folder / name / "settings.json")
        for part in settings.values():
            part.pop("weights", None)
            part.pop("model", None)
            part.pop("checkpointing", None)
        return settings

    changed = differing_keys(read(first), read(second))
    if changed:
        raise PearError(
            f"{first.name} and {second.name} differ in {', '.join(changed)}; they cannot be compared"
        )
