"""PEAR's options beside ``megatron sft``'s, and those of its own that would train something else; needs no ms-swift."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import MISSING, field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from pear_megatron.config import PearConfig
from pear_megatron.data import DataConfig
from pear_megatron.errors import CheckpointError, RecipeError
from pear_megatron.schema import StrictModel

log = logging.getLogger("pear_megatron")

PREFIX = "pear_"
# How rows become trajectories (DataConfig).
_OF_DATA = ("overlong", "truncated", "multi_turn", "chat_template", "cache_dir")
_Rule = tuple[str, tuple[Any, ...], str]
# Options as they are given: what they may be, and what to do otherwise.
_NEEDED: tuple[_Rule, ...] = (
    ("packing", (True,), "rows hold several trajectories, --max_length positions in all; give --packing true"),
    ("padding_free", (True,), "packed rows have no attention mask; leave it out"),
    ("task_type", (None, "causal_lm"), "the loss is one of next tokens; leave it out"),
    ("rlhf_type", (None,), "this is supervised training; leave it out"),
    ("loss_type", (None,), "the loss is PEAR's; leave it out"),
    ("calculate_per_token_loss", (None, True), "every micro-batch would count alike, however few decisions it has; "
     "leave it out"),
    ("enable_dft_loss", (False,), "the loss is PEAR's; its DFT is --pear_dft_power 1"),
    ("enable_channel_loss", (False,), "the losses of channels would not be reported; leave it out"),
    ("loss_scale", ("default",), "tokens' own weights are the column token_weights of the rows; leave it out"),
    ("mtp_num_layers", (None,), "ms-swift's model computes their loss with its own loss alone; leave it out"),
    ("truncation_strategy", (None,), "a cut trajectory has lost its suffix, so that its weights would be another's; to "
     "leave long ones out, --pear_overlong drop"),
    ("attention_backend", ("flash", "flash_2", "flash_3", "flash_4", "fused", "auto"),
     "ms-swift packs no rows with it; use flash"),
    ("cp_partition_mode", ("zigzag",), "suffix sums know zigzag chunks; leave it out"),
    ("sequence_packing_scheduler", (None,), "it would pack the packed rows anew; leave it out"),
    ("bridge_backend", ("mcore-bridge",), "how its models take packed rows was not checked; use mcore-bridge"),
    ("ignore_args_error", (False,), "misspelt options, PEAR's among them, would pass; leave it out"),
)  # fmt: skip
# Options of ms-swift's own data sets and templates, which are not used: left as they are, or refused.
_UNREAD = (
    "cached_dataset", "cached_val_dataset", "split_dataset_ratio", "streaming", "interleave_prob", "columns",
    "custom_dataset_info", "model_name", "model_author", "dataset_shuffle", "train_dataloader_shuffle", "data_sharding",
    "group_by_length", "packing_length", "packing_strategy", "lazy_tokenize", "system", "agent_template",
    "use_chat_template", "preserve_thinking",
)  # fmt: skip


def option_fields() -> list[tuple[str, Any, Any]]:
    """PearConfig's fields, and the data's, as fields of a dataclass that ms-swift's parser reads."""
    models: list[tuple[type[StrictModel], Iterable[str]]] = [
        (PearConfig, PearConfig.model_fields),
        (DataConfig, _OF_DATA),
    ]
    found: list[tuple[str, Any, Any]] = []
    for model, names in models:
        for name in names:
            info = model.model_fields[name]
            shown = {"help": f"{model.__name__}.{name}; default: {info.default}"}
            if get_origin(info.annotation) is tuple:
                pair: Any = field(default_factory=partial(list, info.default), metadata=shown)
                found.append((PREFIX + name, list[float], pair))
            else:
                found.append((PREFIX + name, info.annotation, field(default=info.default, metadata=shown)))
    return found


def pear_config(args: Any) -> PearConfig:
    """The loss that the options ask for.

    Raises:
        RecipeError: a bad value; names the option.
    """
    try:
        return PearConfig(**{name: getattr(args, PREFIX + name) for name in PearConfig.model_fields})
    except ValidationError as error:
        raise RecipeError("; ".join(map(_said, error.errors()))) from error


def data_config(args: Any, files: list[str]) -> DataConfig:
    """The trajectories of ``--dataset``, or of ``--val_dataset``, for the model's tokenizer."""
    return DataConfig(
        train=files,
        seq_length=args.seq_length,
        tokenizer=args.model_dir,
        **{name: getattr(args, PREFIX + name) for name in _OF_DATA},
    )


def _said(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    return f"--{PREFIX}{key}: {text}" if key else f"{text} (each option with the prefix --{PREFIX})"


def check_options(args: Any) -> None:
    """Refuses options of ``megatron sft`` that would be ignored, or train something else.

    Args:
        args: its arguments, a dataclass, as they were given: before they are completed.

    Raises:
        RecipeError: all of them, each with its reason and the way out.
    """
    wrong = [
        f"--{name} {getattr(args, name)}: {why}"
        for name, allowed, why in _NEEDED
        if getattr(args, name, allowed[0]) not in allowed
    ]
    for known in fields(args):
        default = known.default if known.default_factory is MISSING else known.default_factory()
        if known.name in _UNREAD and getattr(args, known.name) != default:
            wrong.append(
                f"--{known.name} {getattr(args, known.name)}: it is of ms-swift's own data sets and templates, and the "
                "rows are scored trajectories, read as they are; leave it out"
            )
    if not args.dataset:
        wrong.append("--dataset is missing; name the scored trajectories")
    if args.max_length is None:
        wrong.append("--max_length is missing; give the positions of a row")
    _raise(wrong)


def check_completed(args: Any, multiple: int) -> None:
    """The same, for what is known once the arguments are complete.

    Args:
        args: the arguments.
        multiple: what context and sequence parallelism and FP8 need a row to be a multiple of.

    Raises:
        RecipeError: as check_options.
        CheckpointError: the checkpoint to go on from was trained under another loss.
    """
    wrong = []
    if args.is_multimodal:
        wrong.append(f"--model {args.model}: trajectories hold text alone; use a model of text")
    if args.seq_length % multiple:
        wrong.append(
            f"--max_length {args.seq_length}: with these parallel sizes and this precision rows are a multiple of "
            f"{multiple}; choose one"
        )
    _raise(wrong)
    _check_resumed(args)


def check_model(config: Any) -> None:
    """Refuses what ``--megatron_extra_kwargs`` may have made of the model's configuration.

    Raises:
        RecipeError: names the setting and the way out.
    """
    if getattr(config, "cuda_graph_impl", "none") not in (None, "none"):
        raise RecipeError(
            f"--megatron_extra_kwargs: cuda_graph_impl is {config.cuda_graph_impl!r}, and a graph keeps the boundaries "
            "of the rows that it was captured with; leave it out"
        )


def _raise(wrong: list[str]) -> None:
    if wrong:
        raise RecipeError("megatron sft's options do not go with PEAR:\n  " + "\n  ".join(wrong))


def _check_resumed(args: Any) -> None:
    """Refuses to go on (``--finetune false``) from a checkpoint with another loss: its args.json says which."""
    folder = args.mcore_adapter or next(iter(args.adapters), None) or args.mcore_model or args.model
    if args.finetune or folder is None or not (file := Path(folder) / "args.json").is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if PREFIX + "variant" not in before:
        log.warning("PEAR: %s does not say which loss it was trained with; not checked", folder)
        return
    changed = [
        f"--{key} {before[key]}, and this run has {getattr(args, key)}"
        for key in (PREFIX + name for name in PearConfig.model_fields)
        if key in before and before[key] != getattr(args, key)
    ]
    if changed:
        raise CheckpointError(
            f"{folder} was trained with {'; '.join(changed)}; give the same again, or begin another run from its "
            "weights with --finetune true"
        )
