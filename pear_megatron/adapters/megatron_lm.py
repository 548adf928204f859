"""PEAR in Megatron-LM's own loop: ``megatron.training.pretrain`` of megatron-core 0.19 and later.

    from pear_megatron.adapters import megatron_lm as pear

    args = parse_and_validate_args(extra_args_provider=pear.add_arguments, args_defaults=pear.DEFAULTS)
    pretrain(config, pear.datasets, ModelType.encoder_or_decoder, pear.forward_step(args))

examples/megatron_lm/pretrain_pear.py is that program whole.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch

from pear_megatron.adapters.megatron_lm_model import check_loaded_model, describe_checkpoints
from pear_megatron.adapters.offline_data import OfflineBatches, open_trajectories
from pear_megatron.config import PearConfig
from pear_megatron.data import DataConfig
from pear_megatron.data.columns import Columns, needs_behavior_logprobs
from pear_megatron.errors import RecipeError
from pear_megatron.megatron.forward_step import PearForwardStep

log = logging.getLogger("pear_megatron")

DEFAULTS = {"dataloader_type": "external"}
_PREFIX = "pear_"
# Megatron's arguments that the loss needs, what they must be, and why.
_NEEDED: tuple[tuple[str, Any, str], ...] = (
    ("calculate_per_token_loss", True, "packed rows hold different numbers of decisions, and every one counts alike"),
    ("dataloader_type", "external", "the micro-batches come from --pear-data"),
    ("cuda_graph_impl", "none", "a graph keeps the boundaries of the rows that it was captured with"),
    ("rampup_batch_size", None, "the order of the rows rests on one batch size"),
    ("decrease_batch_size_if_needed", False, "the order of the rows rests on one batch size"),
    ("sft", False, "its evaluation averages means of micro-batches, which hold different numbers of decisions"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """``extra_args_provider``: PEAR's settings (--pear-variant, ...) and its data, beside Megatron-LM's own."""
    group = parser.add_argument_group(title="PEAR")
    group.add_argument("--pear-data", nargs="+", required=True, metavar="FILE", help="scored trajectories")
    group.add_argument("--pear-validation-data", nargs="+", metavar="FILE", help="for evaluations")
    group.add_argument("--pear-data-cache", metavar="FOLDER", help="default: beside the first file")
    group.add_argument("--pear-tokenizer", metavar="FOLDER", help="for rows of text; default: none")
    group.add_argument(
        "--pear-vocab-size",
        type=int,
        help="tokens that are real; columns beyond are padding. Default: --vocab-size, or else the tokenizer's",
    )
    for name, field in PearConfig.model_fields.items():
        options: dict[str, Any] = {"default": field.default}
        if get_origin(field.annotation) is Literal:
            options["choices"] = get_args(field.annotation)
        elif get_origin(field.annotation) is tuple:
            options |= {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
        elif field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = next(
                (t for t in get_args(field.annotation) if t is not type(None)), field.annotation
            )
        option = f"--{_PREFIX}{name}".replace("_", "-")
        group.add_argument(option, help=f"PearConfig.{name}; default: {field.default}", **options)
    return parser


def pear_config(args: argparse.Namespace) -> PearConfig:
    """The loss that the arguments ask for; pydantic's ValidationError (a ValueError) where they do not fit."""
    return PearConfig(**{name: getattr(args, _PREFIX + name) for name in PearConfig.model_fields})


def forward_step(args: argparse.Namespace) -> PearForwardStep:
    """``forward_step_func`` for ``pretrain``, from the validated arguments.

    Raises:
        RecipeError: Megatron's arguments do not go with the loss; says which and why.
    """
    for name, needed, why in _NEEDED:
        if getattr(args, name, needed) != needed:
            option = f"--{name}".replace("_", "-")
            wanted = f"{option} {needed}" if isinstance(needed, str) else option
            raise RecipeError(f"PEAR needs {wanted if needed else f'no {option}'}: {why}")
    flat = args.transformer_impl != "local" and (args.bf16 or args.fp16)
    if flat and args.micro_batch_size != 1:
        raise RecipeError(
            f"--micro-batch-size {args.micro_batch_size}: Transformer Engine takes a packed micro-batch as a single "
            "row; give 1 and a longer --seq-length"
        )
    return PearForwardStep(
        pear_config(args),
        vocab_size=_vocab_size(args),
        packed_attention="thd" if flat else "mask",
        watch=True,
        check_alignment=True,
    )


def datasets(
    num_samples: tuple[int | None, ...], vp_stage: int | None = None
) -> tuple[OfflineBatches, OfflineBatches | None, None]:
    """``train_valid_test_dataset_provider``: this rank's micro-batches of --pear-data and --pear-validation-data.

    Raises:
        DataError: what is wrong with the files, by file and line.
        RecipeError: sizes that do not divide, evaluations without data, or another loss than the run that is resumed.
    """
    from megatron.training import get_args

    args = get_args()
    _check_resumed(args)
    check_loaded_model(args)
    train = _batches(
        args, args.pear_data, args.global_batch_size, consumed_samples=args.consumed_train_samples
    )
    if args.rank == 0:
        describe_checkpoints(args, _vocab_size(args))
        train.announce(args.train_iters)
    if not args.eval_iters:
        return train, None, None
    if args.pear_validation_data is None:
        raise RecipeError(
            f"--eval-iters {args.eval_iters} without --pear-validation-data; name held-out trajectories, or give "
            "--eval-iters 0"
        )
    size = args.eval_global_batch_size
    return train, _batches(args, args.pear_validation_data, size, period=args.eval_iters), None


def _check_resumed(args: argparse.Namespace) -> None:
    """Refuses to go on from a checkpoint with another loss: --use-checkpoint-args takes the model from there alone."""
    if args.load is None or args.finetune or not args.iteration:
        return
    from megatron.core.dist_checkpointing import load_common_state_dict

    folder = Path(args.load) / f"iter_{args.iteration:07d}"
    if not (folder / "metadata.json").is_file():
        log.warning("PEAR: %s does not say which loss it was trained with; not checked", folder)
        return
    stored = vars(load_common_state_dict(str(folder)).get("args", argparse.Namespace()))
    now = pear_config(args)
    before = pear_config(argparse.Namespace(**{**vars(args), **stored}))
    for name in PearConfig.model_fields:
        given, was = getattr(now, name), getattr(before, name)
        if given != was:
            option = f"--{_PREFIX}{name}".replace("_", "-")
            shown = " ".join(map(str, was)) if isinstance(was, tuple) else was
            raise RecipeError(
                f"{folder} was trained with {option} {shown}, and this run has {given}; give that again (no --pear-* "
                "comes out of a checkpoint), or begin another run from its weights with --finetune"
            )


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank calls it, and makes its own part


def _batches(
    args: argparse.Namespace, files: list[str], global_batch_size: int, **options: Any
) -> OfflineBatches:
    from megatron.core import parallel_state

    config = DataConfig(
        train=files, seq_length=args.seq_length, tokenizer=args.pear_tokenizer, cache_dir=args.pear_data_cache
    )
    pear = pear_config(args)
    training = "consumed_samples" in options
    return OfflineBatches(
        open_trajectories(
            config,
            needs_logprobs=needs_behavior_logprobs(pear),
            vocab_size=_vocab_size(args),
            columns=Columns.of(pear),
        ),
        seq_length=args.seq_length,
        global_batch_size=global_batch_size,
        micro_batch_size=args.micro_batch_size if training else args.eval_micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        seed=args.seed,
        device=torch.device(torch.cuda.current_device()),
        **options,
    )


def _vocab_size(args: argparse.Namespace) -> int:
    given = args.pear_vocab_size or args.vocab_size
    if given:
        return given
    from megatron.training import get_tokenizer

    return get_tokenizer().vocab_size
