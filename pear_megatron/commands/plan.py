"""`pear-megatron plan`: memory, steps and hours of a recipe, before a GPU is asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pear_megatron.plan import Plan, RunLength
    from pear_megatron.recipe import Recipe

EPILOG = (
    "Example: pear-megatron plan --config recipes/sft/qwen2.5-7b.yaml --tokens 200000000 "
    "parallel.tensor_model_parallel_size=4"
)
_NO_DATA = "(data.train is not given)"
_ITEMS = {
    "weights": "weights",
    "gradients": "gradients, float32",
    "optimizer": "optimizer state",
    "activations": "activations for backward",
    "logits": "logits, then their gradient",
    "loss": "PEAR's vectors",
    "working": "recomputed, gradients",
    "reserve": "reserve (assumed)",
}


def plan(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="overrides of the recipe's keys, key=value", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="the recipe; must be given", show_default=False)] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="cluster.num_nodes")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="tokens of an epoch, instead of data")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="model-FLOPs utilisation to assume")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say whether a recipe fits its GPUs and how long it takes. Needs no GPU, no weights and no data.

    With data.train, counts the tokens and steps, and leaves the prepared data for training. Exit code 1, and
    the change that would help, if the recipe does not fit.
    """
    from pear_megatron.errors import RecipeError
    from pear_megatron.recipe import load_recipe

    if config is None:
        named = next((word for word in overrides or [] if word.endswith((".yaml", ".yml"))), "RECIPE.yaml")
        raise RecipeError(f"the recipe is missing: pear-megatron plan --config {named} [key=value ...]")
    given = [*(overrides or []), *([f"cluster.num_nodes={nodes}"] if nodes else [])]
    recipe = load_recipe(config, given, missing={"data": {"train": _NO_DATA}})
    from pear_megatron.plan import make_plan

    try:
        found = make_plan(recipe, mfu=mfu)
        if found.fits and (length := _length(recipe, tokens)) is not None:  # data take time to read
            found = make_plan(recipe, length=length, mfu=mfu)
        if as_json:
            print(json.dumps(found.as_dict(), indent=1))
        else:
            _print(found)
        found.check()
    except RecipeError as error:  # of sizes that do not fit: these do not name the file
        raise RecipeError(f"{config}: {error}") from error


def _length(recipe: Recipe, tokens: int | None) -> RunLength | None:
    from pear_megatron.plan import data_is_there, length_from_data, length_from_tokens

    if tokens is not None:
        return length_from_tokens(recipe, tokens)
    files = recipe.data.train_files
    if files == [_NO_DATA]:
        return None
    if not data_is_there(files):
        print(f"data.train {', '.join(files)}: not here, so not counted", file=sys.stderr)
        return None
    return length_from_data(recipe, progress=sys.stderr.isatty())


def _print(found: Plan) -> None:
    console = Console()
    for table in (_layout_table(found), _memory_table(found), _run_table(found), _disk_table(found)):
        console.print(table)


def _rows(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _layout_table(found: Plan) -> Table:
    recipe, parallel, cluster = found.recipe, found.recipe.parallel, found.recipe.cluster
    sizes = [("TP", parallel.tensor_model_parallel_size), ("PP", parallel.pipeline_model_parallel_size)]
    if parallel.context_parallel_size > 1:
        sizes.append(("CP", parallel.context_parallel_size))
    sizes.append(("DP", found.dp_size))
    parameters = f"{found.parameters / 1e9:.3f} B"
    if found.active_parameters < found.parameters:
        parameters += f", of which a token meets {found.active_parameters / 1e9:.3f} B"
        sizes.append(("EP", parallel.expert_model_parallel_size))
    train = recipe.train
    rows = [
        ("parameters", parameters),
        ("GPUs", f"{found.gpus} = {cluster.num_nodes} node(s) x {cluster.gpus_per_node} {cluster.gpu}"),
        ("layout", " x ".join(f"{name} {size}" for name, size in sizes)),
        (
            "micro-batches a step",
            f"{found.num_microbatches} of {train.micro_batch_size} row(s) on each DP rank",
        ),
        ("positions a step", f"{train.global_batch_size * recipe.data.seq_length:,}"),
    ]
    if found.bubble:
        rows.append(("pipeline bubble", f"{found.bubble:.1%}"))
    return _rows("Layout", rows)


def _memory_table(found: Plan) -> Table:
    ends = {found.stages[0], found.fullest, found.stages[-1]}
    stages = [stage for stage in found.stages if len(found.stages) <= 4 or stage in ends]
    table = Table(title="Memory of a rank, GiB", title_justify="left")
    table.add_column("")
    for stage in stages:
        table.add_column(f"stage {stage.stage + 1}", justify="right")
    for name, text in _ITEMS.items():
        table.add_row(text, *(_gib(stage.items[name]) for stage in stages))
    table.add_section()
    table.add_row("needed", *(_gib(stage.total) for stage in stages))
    if found.memory is not None:
        table.add_row("a GPU has", *(_gib(found.memory) for _ in stages))
    if any(stage.host for stage in stages):
        table.add_row("optimizer state on the host", *(_gib(stage.host) for stage in stages))
    return table


def _gib(size: int) -> str:
    from pear_megatron.plan.gpus import GIB

    return "< 0.1" if 0 < size < 0.05 * GIB else f"{size / GIB:.1f}"


def _run_table(found: Plan) -> Table:
    rows: list[tuple[str, str]] = []
    length = found.length
    if length is None:
        rows.append(("steps", "unknown: give data.train, or --tokens"))
    else:
        if length.trajectories is not None:
            rows.append(("trajectories", f"{length.trajectories:,}"))
        rows.append(("tokens per epoch", f"{length.tokens:,}, prompts and responses, no padding"))
        if length.decisions is not None:
            rows.append(("decisions per epoch", f"{length.decisions:,}"))
        rows.append(("steps", f"{length.steps:,} ({length.steps_per_epoch:,} an epoch)"))
    if found.step_seconds is not None:
        assumed = f"at an assumed MFU of {found.mfu:.0%}"
        rows.append(("a step", f"{found.step_seconds:.1f} s, {assumed}" + ("" if length else ", rows full")))
    if found.hours is not None:
        rows.append(("the run", f"{found.hours:.2f} h, {found.hours * found.gpus:,.1f} GPU-hours"))
    return _rows("Time", rows)


def _disk_table(found: Plan) -> Table:
    from pear_megatron.storage import show_bytes

    disk = found.disk
    parts = f"weights {show_bytes(disk.weights)}, optimizer {show_bytes(disk.optimizer)}"
    rows = [("a checkpoint", f"{show_bytes(disk.checkpoint)}: {parts}")]
    if disk.kept is None or disk.most is None:
        rows.append(
            ("checkpoints", f"all kept, {_when_saved(found.recipe)}; checkpoint.keep_last bounds them")
        )
    else:
        at_once = f"{disk.most} at once at most: {show_bytes(disk.most * disk.checkpoint)}"
        rows.append(("checkpoints", f"{disk.kept} kept, {at_once}"))
    rows.append(("an export", show_bytes(disk.export)))
    if disk.exports is None:
        interval = found.recipe.checkpoint.export_interval
        rows.append(("exports", f"one each {interval} steps, all kept"))
    elif disk.exports:
        rows.append(("exports", f"{disk.exports}, all kept: {show_bytes(disk.exports * disk.export)}"))
    return _rows("Disk", rows)


def _when_saved(recipe: Recipe) -> str:
    interval, best = recipe.checkpoint.save_interval, recipe.checkpoint.keep_best
    when = [f"one each {interval} steps"] if interval is not None else []
    return " and ".join([*when, *(["one at every evaluation that is the best so far"] if best else [])])
