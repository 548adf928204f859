"""`pear-megatron validate`: what the data contain, and whether training accepts them."""

from __future__ import annotations

import sys
import tempfile
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pear_megatron.commands.text_options import (
    ChatTemplateKwargsOption,
    ChatTemplateOption,
    MultiTurnOption,
    text_settings,
)

if TYPE_CHECKING:
    from pear_megatron.data import Trajectory, TrajectoryDataset

EPILOG = "Example: pear-megatron validate data/train.parquet --seq-length 8192 --tokenizer path/to/tokenizer"


def validate(
    data: Annotated[
        list[str], typer.Argument(help="JSONL or Parquet files; globs allowed", show_default=False)
    ],
    seq_length: Annotated[int, typer.Option(help="data.seq_length of the recipe")] = 4096,
    vocab_size: Annotated[int | None, typer.Option(help="refuse token ids from here on")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="for rows of text, to refuse foreign tokens, and to show trajectories")
    ] = None,
    multi_turn: MultiTurnOption = None,
    chat_template: ChatTemplateOption = None,
    chat_template_kwargs: ChatTemplateKwargsOption = None,
    truncated: Annotated[
        Literal["drop", "keep", "error"],
        typer.Option(help="rows marked truncated: data.truncated of the recipe"),
    ] = "drop",
    plain_sft: Annotated[bool, typer.Option("--plain-sft", help="behavior_logprobs are not needed")] = False,
    show: Annotated[int | None, typer.Option(min=0, help="trajectories to show as text; default: 1")] = None,
    identity: Annotated[
        str | None,
        typer.Option(
            "--id", help="show the trajectory, or all turns of the row, with this id", show_default=False
        ),
    ] = None,
) -> None:
    """Check trajectories as training would, say what is in them, and show one: its decisions are coloured, or
    between [[ ]] in a pipe. Exit code 1 if they are broken.
    """
    from pear_megatron.data import DataConfig, TrajectoryDataset, load_tokenizer, prepare
    from pear_megatron.data.columns import ALL_COLUMNS
    from pear_megatron.data.options import FILE_OPTIONS, in_options

    with tempfile.TemporaryDirectory(prefix="pear-validate-") as folder:
        text = text_settings(multi_turn, chat_template, chat_template_kwargs)
        config = DataConfig(
            train=data,
            seq_length=seq_length,
            tokenizer=tokenizer,
            truncated=truncated,
            cache_dir=folder,
            **text,
        )
        with in_options({**FILE_OPTIONS, "data.truncated=": "--truncated "}):
            prepared = prepare(
                config,
                require_behavior_logprobs=not plain_sft,
                columns=ALL_COLUMNS,
                vocab_size=vocab_size,
                progress=sys.stderr.isatty(),
            )
        dataset = TrajectoryDataset.open(prepared)
        shown = _chosen(dataset, show, identity)
        console = Console()
        console.print(_table(dataset, seq_length))
        if shown and tokenizer is None:
            print(
                "no trajectory is shown: the rows are token ids; name the tokenizer (--tokenizer) to read one"
            )
        elif shown and tokenizer is not None:
            loaded = load_tokenizer(tokenizer)
            for index in shown:
                _show(console, dataset[index], loaded)


def _table(dataset: TrajectoryDataset, seq_length: int) -> Table:
    import numpy as np

    from pear_megatron.data import BatchPlan
    from pear_megatron.data.prepare import describe_split

    rows = BatchPlan(dataset.lengths, seq_length, 1, seed=0).steps_per_epoch()
    counts = dataset.meta["counts"]
    found = [
        ("trajectories", f"{len(dataset):,}"),
        ("dropped as truncated", f"{counts.get('dropped_truncated', 0):,}"),
        ("tokens", f"{int(dataset.lengths.sum()):,}, prompts and responses, no padding"),
        ("decisions", f"{int(dataset.num_decisions.sum()):,}"),
        ("longest trajectory", f"{int(dataset.lengths.max()):,} tokens"),
        ("rewards", f"{dataset.rewards.min():g} to {dataset.rewards.max():g}"),
        ("negative examples", f"{int((dataset.rewards < 0).sum()):,}"),
    ]
    if counts.get("token_weights"):
        found.append(("with token_weights", f"{counts['token_weights']:,}"))
    if width := dataset.meta["topk_width"]:
        mass = sum(float(np.exp(t.behavior_topk.logprobs).sum()) for t in dataset if t.behavior_topk)
        mean = mass / int(dataset.num_decisions.sum())
        found.append(
            ("behavior_topk", f"up to {width} entries per decision, {mean:.2%} of the mass on average")
        )
    if dataset.has("reference_logprobs"):
        found.append(("reference_logprobs", "on all decisions"))
    if split := describe_split(counts):
        found.append(("split (--multi-turn)", split))
    found += [(note, f"{count:,}") for note, count in dataset.meta["notes"].items()]
    found.append((f"rows of {seq_length:,} when packed", f"{rows:,}"))
    table = Table(show_header=False)
    for name, value in found:
        table.add_row(name, value)
    return table


def _chosen(dataset: TrajectoryDataset, show: int | None, identity: str | None) -> list[int]:
    """Indices of the trajectories to show; DataError where none has this id."""
    from pear_megatron.data import DataError

    if identity is None:
        return list(range(min(1 if show is None else show, len(dataset))))
    found = [i for i, t in enumerate(dataset) if t.id == identity or t.id.rpartition("#")[0] == identity]
    if not found:
        few = ", ".join(dataset[i].id for i in range(min(3, len(dataset))))
        raise DataError(f"--id {identity}: no trajectory has this id; the first are {few}")
    return found if show is None else found[:show]


def _show(console: Console, trajectory: Trajectory, tokenizer: Any) -> None:
    from pear_megatron.data.decoded import in_brackets, left_out_text, stretches

    decisions = int(trajectory.loss_mask.sum())
    tokens, reward = len(trajectory.input_ids), trajectory.reward
    head = f"{trajectory.id}: {tokens:,} tokens, {decisions:,} decisions, reward {reward:g}"
    if not console.is_terminal:
        print(f"\n{head}\n{in_brackets(trajectory, tokenizer)}")
        return
    text = Text()
    for stretch in stretches(trajectory, tokenizer):
        if stretch.left_out:
            text.append(left_out_text(stretch.left_out), style="italic dim")
        else:
            text.append(stretch.text, style="black on green" if stretch.decisions else "dim")
    console.print(f"\n{head}", markup=False, highlight=False)
    console.print(text, soft_wrap=True)
