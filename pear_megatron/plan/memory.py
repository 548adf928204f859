"""stage_memory: what a rank of each pipeline stage holds at its peak, item by item.

Weights, gradients and optimizer state are exact up to Megatron's padding of its buffers; activations follow
activations.py; the reserve for what is in no formula is an assumption, not a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pear_megatron.plan.activations import Activations, activations
from pear_megatron.plan.gpus import GIB
from pear_megatron.plan.parameters import (
    adapter_parameters,
    expert_parameters,
    layer_matrices,
    rank_parameters,
    word_embedding_parameters,
)
from pear_megatron.recipe import Recipe
from pear_megatron.recipe.sections import expert_tensor_size

_CONTEXT = 3 * GIB  # CUDA's and NCCL's own memory, workspaces of cuBLAS and Transformer Engine
_FRAGMENTATION = 0.08  # of what comes and goes in every step
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
_HOST_BYTES = 16  # of an offloaded parameter, all in float32: weight, gradient and two moments
# GEMMs of a layer that Transformer Engine gives a buffer of hidden states, with tp_comm_overlap.
_USERBUFFERS = 12
_FP8_BYTES = 2  # of a layer's matrix: itself and its transpose, cast once a step


@dataclass(frozen=True)
class StageMemory:
    """Peak memory of one rank of a pipeline stage, in bytes.

    Attributes:
        weights, gradients, optimizer: of the parameters the rank holds, the last two of those that it trains (under
            LoRA, the adapters'). The weights' FP8 copies are with them, and float32 weights, for bf16 training, with
            the optimizer's state.
        activations: kept for backward, of every micro-batch in flight.
        logits, loss: of one micro-batch; 0 before the last stage.
        working: what is alive besides at the worst moment: recomputed layers, gradients of activations, Transformer
            Engine's userbuffers.
        reserve: CUDA context, NCCL, workspaces, fragmentation; assumed.
        host: in the host's memory: the offloaded part of the optimizer's state.
    """

    stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    loss: int
    working: int
    reserve: int
    host: int = 0

    @property
    def items(self) -> dict[str, int]:
        """Name -> bytes on the GPU, in the order in which people read them."""
        names = (
            "weights", "gradients", "optimizer", "activations", "logits", "loss", "working", "reserve"
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(self.items.values())


def stage_memory(recipe: Recipe, dp_size: int) -> list[StageMemory]:
    """The memory of every pipeline stage's ranks, with the data-parallel size that ``check_layout`` gives."""
    return [_stage(recipe, dp_size, stage) for stage in range(recipe.parallel.pipeline_model_parallel_size)]


def _stage(recipe: Recipe, dp_size: int, stage: int) -> StageMemory:
    model, parallel, settings = recipe.model, recipe.parallel, recipe.optimizer
    bf16 = recipe.train.precision == "bf16"
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    last = stage == pp - 1
    ep, expert_tp = parallel.expert_model_parallel_size, expert_tensor_size(parallel)
    dense = rank_parameters(model, tp, pp, stage)
    experts = model.num_layers // pp * expert_parameters(model, ep, expert_tp)
    matrices = model.num_layers // pp * layer_matrices(model, tp) + experts
    count = dense + experts
    if recipe.lora is not None:  # not of mixtures
        dense = adapter_parameters(model, recipe.lora, tp, pp)
        experts, count = 0, count + dense
    # An expert's copies are on fewer ranks than a dense parameter's: its optimizer state is in fewer shards.
    shards = dp_size * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    expert_shards = shards * tp // (ep * expert_tp) if parallel.use_distributed_optimizer else 1
    held = -(-dense // shards) - (-experts // expert_shards)
    offloaded = math.ceil(held * settings.optimizer_offload_fraction) if settings.optimizer_cpu_offload else 0
    saved = 4 * matrices if settings.optimizer == "muon" else 0  # it has one moment
    sizes = activations(recipe)
    num_microbatches = recipe.train.global_batch_size // (recipe.train.micro_batch_size * dp_size)
    kept, recomputed = _kept(recipe, sizes, stage, num_microbatches)

    at_layer = recomputed + sizes.layer_backward
    at_loss = 0
    if last:
        kept += 2 * sizes.hidden  # the final norm's input and output
        at_loss = sizes.logits + sizes.loss + sizes.output_backward
        if pp == 1 and recipe.lora is None and model.share_embeddings_and_output_weights:
            # The output layer's gradient waits for the embedding's.
            at_layer += (2 if bf16 else 4) * word_embedding_parameters(model, tp)
    logits, loss = (sizes.logits, sizes.loss) if last else (0, 0)
    working = max(at_loss, at_layer) - logits - loss
    return StageMemory(
        stage=stage,
        parameters=count,
        weights=count * (2 if bf16 else 4) + (_FP8_BYTES * matrices if recipe.train.fp8 else 0),
        gradients=(dense + experts) * _BYTES[settings.main_grads_dtype],
        optimizer=(held - offloaded) * _state_bytes(recipe) - saved,
        activations=kept,
        logits=logits,
        loss=loss,
        working=working + (_USERBUFFERS * sizes.hidden * tp if parallel.tp_comm_overlap else 0),
        reserve=_CONTEXT + int(_FRAGMENTATION * (kept + logits + loss + working)),
        host=offloaded * _HOST_BYTES,
    )


def _state_bytes(recipe: Recipe) -> int:
    """Bytes of AdamW's state for a parameter."""
    settings = recipe.optimizer
    if settings.use_precision_aware_optimizer and not settings.optimizer_cpu_offload:
        main = 2  # float16, or what a float32 weight has more than the bf16 one
        return main + _BYTES[settings.exp_avg_dtype] + _BYTES[settings.exp_avg_sq_dtype]
    return 12 if recipe.train.precision == "bf16" else 8


def _kept(recipe: Recipe, sizes: Activations, stage: int, num_microbatches: int) -> tuple[int, int]:
    """Bytes kept for backward by all micro-batches in flight, and bytes recomputed at a time."""
    train, parallel = recipe.train, recipe.parallel
    pp = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    layers = recipe.model.num_layers // (pp * virtual)  # of a model chunk
    chunk, recomputed = layers * sizes.layer, 0
    if train.recompute_granularity == "full":
        n = min(train.recompute_num_layers or 1, layers)
        if train.recompute_method == "uniform":
            chunk, recomputed = -(-layers // n) * sizes.hidden, n * sizes.layer
        else:
            # While these are recomputed, the layers after them are done and their activations freed.
            chunk = n * sizes.hidden + (layers - n) * sizes.layer
            recomputed = sizes.layer if n == layers else 0
    if stage < pp - 1:
        chunk += sizes.hidden  # what was sent on to the next stage
    return chunk * _chunks_in_flight(stage, pp, virtual, num_microbatches), recomputed


def _chunks_in_flight(stage: int, pp: int, virtual: int, num_microbatches: int) -> int:
    """Forward passes of model chunks that wait for their backward pass, at most (1F1B, interleaved or not)."""
    if virtual == 1:
        return min(pp - stage, num_microbatches)
    return min(2 * (pp - stage - 1) + (virtual - 1) * pp + 1, num_microbatches * virtual)
