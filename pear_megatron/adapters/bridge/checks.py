"""What Megatron-Bridge's configuration must say for PEAR: everything that would silently train something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pear_megatron.data import DataConfig
from pear_megatron.errors import RecipeError


def check(config: Any, data: DataConfig, validation: list[str] | None) -> None:
    """Asks a ConfigContainer for everything at once; before Bridge completes it, and after.

    Args:
        config: the container; its ``dataset`` is not looked at.
        data: the trajectories.
        validation: files for evaluations.

    Raises:
        RecipeError: each thing that does not go with the loss, why, and the way out.
    """
    wrong = list(_wrong(config, data, validation))
    if wrong:
        raise RecipeError("Megatron-Bridge's configuration does not go with PEAR:\n  " + "\n  ".join(wrong))


def packed_attention(config: Any) -> str:
    """How rows are kept apart: ``thd`` with Transformer Engine's layers, ``mask`` with Megatron's local ones."""
    local = getattr(_transformer(config.model), "transformer_impl", "transformer_engine") == "local"
    return "mask" if local else "thd"


def _transformer(model: Any) -> Any:
    """The TransformerConfig: a provider is one, a ModelConfig has one."""
    return getattr(model, "transformer", model)


def _wrong(config: Any, data: DataConfig, validation: list[str] | None) -> Iterator[str]:
    model, train = config.model, config.train
    transformer = _transformer(model)
    if not transformer.calculate_per_token_loss:
        yield (
            "config.model.calculate_per_token_loss is false: every micro-batch would count alike, however few "
            "decisions its packed rows hold; set it to True"
        )
    if config.ddp.average_in_collective:
        yield (
            "config.ddp.average_in_collective is true: gradients would be divided by the number of ranks, and they "
            "are divided by the number of decisions; set it to False"
        )
    if data.seq_length != model.seq_length:
        yield (
            f"data.seq_length is {data.seq_length} and config.model.seq_length {model.seq_length}: rows must be as "
            "long as the pipeline expects them; make them the same"
        )
    if data.validation is not None:
        yield "data.validation would not be read: held-out files are finetune()'s validation_data"
    if data.train != data.train_files:
        yield "data.train names sources, and this adapter does not blend them; list their files"
    if not data.packing:
        yield "data.packing is false, and this adapter packs; leave it true"
    yield from _wrong_batches(config, validation)
    if getattr(transformer, "cuda_graph_impl", "none") not in (None, "none"):
        yield (
            f"config.model.cuda_graph_impl is {transformer.cuda_graph_impl!r}: a graph keeps the boundaries of the "
            "rows that it was captured with; set it to 'none'"
        )
    if getattr(model, "kd_config", None) is not None:
        yield "config.model distils from a teacher, whose loss would not be computed; use the student's provider"
    if train.num_epochs is not None:
        yield "config.train.num_epochs needs Bridge's own data sets; set train_iters (the run says an epoch's)"


def _wrong_batches(config: Any, validation: list[str] | None) -> Iterator[str]:
    train, evaluation = config.train, config.validation
    if packed_attention(config) == "thd":
        for name, size in (
            ("train.micro_batch_size", train.micro_batch_size),
            ("validation.eval_micro_batch_size", evaluation.eval_micro_batch_size),
        ):
            if size not in (None, 1):
                yield (
                    f"config.{name} is {size}: Transformer Engine takes a packed micro-batch as a single row; set "
                    "it to 1, with a longer seq_length"
                )
    if getattr(train, "rampup_batch_size", None) is not None:
        yield "config.train.rampup_batch_size: a resumed run would see other batches; set it to None"
    if getattr(train, "decrease_batch_size_if_needed", False):
        yield "config.train.decrease_batch_size_if_needed changes which rows a step sees; set it to False"
    if evaluation.eval_iters and validation is None:
        yield (
            f"config.validation.eval_iters is {evaluation.eval_iters} and there is no validation_data; name "
            "held-out trajectories, or set it to 0"
        )
    if validation is not None and not evaluation.eval_iters:
        yield "validation_data would not be read: config.validation.eval_iters is 0; set it, or leave the files out"
    if getattr(config.dist, "eval_context_parallel_size", None) is not None:
        yield (
            "config.dist.eval_context_parallel_size: rows are cut for the training's ranks; set it to None"
        )
