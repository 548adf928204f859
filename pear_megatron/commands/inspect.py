"""`pear-megatron inspect`: what the weights will look like, before a GPU-hour is spent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pear_megatron.commands.text_options import (
    ChatTemplateKwargsOption,
    ChatTemplateOption,
    MultiTurnOption,
    text_settings,
)
from pear_megatron.streams import log_lines

EPILOG = (
    "Example: pear-megatron inspect data/train.parquet --model path/to/student "
    "pear.variant=block pear.baseline=sequence_mean"
)
_OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w.]*=")


def inspect(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA]... [pear.KEY=VALUE]...",
            help="JSONL or Parquet files, globs allowed (default: the recipe's data.train), and overrides",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="the policy that training starts from: a Hugging Face folder, a run or a checkpoint"
        ),
    ] = None,
    scored: Annotated[
        bool, typer.Option("--scored", help="take the policy's log-probs from the column policy_logprobs")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="HTML page to write; its numbers go beside it as .json")
    ] = Path("inspect.html"),
    config: Annotated[
        Path | None, typer.Option(help="take data and settings from this recipe", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="for rows of text and for reading (default: the recipe's, or the model's)"),
    ] = None,
    multi_turn: MultiTurnOption = None,
    chat_template: ChatTemplateOption = None,
    chat_template_kwargs: ChatTemplateKwargsOption = None,
    max_trajectories: Annotated[
        int, typer.Option(min=1, help="of more than these, as many are drawn at random")
    ] = 512,
    seed: Annotated[int, typer.Option(min=0, help="of that draw")] = 0,
    seq_length: Annotated[int, typer.Option(min=1, help="data.seq_length, where no recipe says it")] = 4096,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what --output holds")] = False,
) -> None:
    """Show the importance ratios and weights that training would see, and what to change.

    Exit code 1 if training would refuse the data.
    """
    from pear_megatron.errors import RecipeError

    log_lines()
    words = arguments or []
    overrides = [word for word in words if _OVERRIDE.match(word) and not Path(word).exists()]
    if model is not None and scored:
        raise RecipeError("--model and --scored both name the policy's log-probs; give one of them")
    for file in (output, output.with_suffix(".json")):
        if file.is_file() and not overwrite:
            raise RecipeError(f"{file} is there; name another --output, or replace it with --overwrite")
    from pear_megatron.data.options import FILE_OPTIONS, in_options
    from pear_megatron.inspect.run import run
    from pear_megatron.inspect.settings import read_settings

    settings = read_settings(
        [word for word in words if word not in overrides],
        overrides,
        recipe=config,
        model=model,
        tokenizer=tokenizer,
        seq_length=seq_length,
        text=text_settings(multi_turn, chat_template, chat_template_kwargs),
    )
    with in_options(FILE_OPTIONS if config is None else {}):
        run(settings, model=model, scored=scored, output=output, max_trajectories=max_trajectories, seed=seed)
