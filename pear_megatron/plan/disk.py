"""run_disk: bytes that a run's checkpoints and its export take, from the recipe alone.

A checkpoint holds, per parameter, the weight in the training precision and the optimizer's state in float32: AdamW's
two moments, and a float32 weight of its own where training is in bf16 or the optimizer is the distributed one. The
vocabulary is padded in a checkpoint and not in an export. A LoRA run's checkpoints hold the adapters alone. Muon has
one moment. What the precision-aware optimizer keeps in fewer bits is float32 in a checkpoint too.
"""

from __future__ import annotations

from dataclasses import dataclass

from pear_megatron.plan.parameters import (
    adapter_parameters,
    expert_parameters,
    layer_matrices,
    model_parameters,
    padded_vocab_size,
)
from pear_megatron.recipe import Recipe

_MOMENTS = 8
_MASTER_WEIGHT = 4


@dataclass(frozen=True)
class RunDisk:
    """Bytes of a run's checkpoints.

    Attributes:
        weights, optimizer: of one checkpoint.
        kept: how many checkpoints stay at the end; None = all of an unknown number.
        most: how many there are at once, at most: a new one is whole before an old one goes; None as well.
        export: of the Hugging Face folder that ``pear-megatron export`` makes of one.
        exports: how many of those the run writes itself; None = not known.
    """

    weights: int
    optimizer: int
    kept: int | None
    most: int | None
    export: int
    exports: int | None = 0

    @property
    def checkpoint(self) -> int:
        """One checkpoint."""
        return self.weights + self.optimizer


def run_disk(recipe: Recipe, steps: int | None) -> RunDisk:
    """What a run of the recipe writes in so many steps; None = not known."""
    model, bf16 = recipe.model, recipe.train.precision == "bf16"
    copies = 1 if model.share_embeddings_and_output_weights else 2
    padded = padded_vocab_size(model.vocab_size, recipe.parallel.tensor_model_parallel_size)
    stored = model_parameters(model) + copies * (padded - model.vocab_size) * model.hidden_size
    if recipe.lora is not None:
        stored = adapter_parameters(model, recipe.lora, 1, 1)
    weight = 2 if bf16 else 4
    matrices = 0
    if recipe.optimizer.optimizer == "muon":
        matrices = model.num_layers * (layer_matrices(model, 1) + expert_parameters(model))
    master = bf16 or recipe.parallel.use_distributed_optimizer
    kept, most = count_checkpoints(recipe.checkpoint.save_interval, recipe.checkpoint.keep_last, steps)
    if recipe.checkpoint.keep_best is not None:  # evaluations save as well, nobody knows how many
        last = recipe.checkpoint.keep_last
        kept, most = (None, None) if last is None else (last + 1, last + 2)
    return RunDisk(
        weights=stored * weight,
        optimizer=stored * (_MOMENTS + (_MASTER_WEIGHT if master else 0)) - matrices * _MOMENTS // 2,
        kept=kept,
        most=most,
        export=model_parameters(model) * weight,
        exports=_exports(recipe.checkpoint.export_interval, steps),
    )


def _exports(interval: int | None, steps: int | None) -> int | None:
    if interval is None:
        return 0
    return None if steps is None else -(-steps // interval)


def count_checkpoints(
    interval: int | None, keep_last: int | None, steps: int | None
) -> tuple[int | None, int | None]:
    """(checkpoints that stay, and that are there at once at most), of a run that saves each ``interval`` steps.

    It saves at its end as well. None where all are kept (``keep_last`` None) and the steps are not known.
    """
    if interval is None:
        return 1, 1
    written = None if steps is None else -(-steps // interval)
    if keep_last is None:
        return written, written
    most = keep_last + 1
    return (keep_last, most) if written is None else (min(keep_last, written), min(most, written))
