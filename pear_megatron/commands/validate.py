"""`pear-megatron validate`: what is in the data, and whether training would take it."""

from __future__ import annotations

import sys
import tempfile
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

EPILOG = "Example: pear-megatron validate data/train.parquet --seq-length 8192 --tokenizer path/to/tokenizer"


def validate(
    data: Annotated[
        list[str], typer.Argument(help="JSONL or Parquet files; globs allowed", show_default=False)
    ],
    seq_length: Annotated[int, typer.Option(help="data.seq_length of the recipe")] = 4096,
    vocab_size: Annotated[int | None, typer.Option(help="refuse token ids from here on")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="for rows of text, and to refuse foreign tokens")
    ] = None,
    plain_sft: Annotated[bool, typer.Option("--plain-sft", help="behavior_logprobs are not needed")] = False,
) -> None:
    """Check trajectories as training would, and say what is in them. Exit code 1 if they are broken."""
    from pear_megatron.data import BatchPlan, DataConfig, TrajectoryDataset, prepare
    from pear_megatron.errors import PearError

    with tempfile.TemporaryDirectory(prefix="pear-validate-") as folder:
        config = DataConfig(train=data, seq_length=seq_length, tokenizer=tokenizer, cache_dir=folder)
        try:
            prepared = prepare(
                config,
                require_behavior_logprobs=not plain_sft,
                vocab_size=vocab_size,
                progress=sys.stderr.isatty(),
            )
        except (PearError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        dataset = TrajectoryDataset.open(prepared)
        rows = BatchPlan(dataset.lengths, seq_length, 1, seed=0).steps_per_epoch()
        counts = dataset.meta["counts"]
        tokens = int(dataset.lengths.sum())
        table = Table(show_header=False)
        for name, value in (
            ("trajectories", f"{len(dataset):,}"),
            ("dropped as truncated", f"{counts.get('dropped_truncated', 0):,}"),
            ("tokens", f"{tokens:,}"),
            ("decisions", f"{int(dataset.num_decisions.sum()):,}"),
            ("longest trajectory", f"{int(dataset.lengths.max()):,} tokens"),
            ("rewards", f"{dataset.rewards.min():g} to {dataset.rewards.max():g}"),
            ("negative examples", f"{int((dataset.rewards < 0).sum()):,}"),
            (f"rows of {seq_length:,} when packed", f"{rows:,}"),
        ):
            table.add_row(name, value)
        Console().print(table)
