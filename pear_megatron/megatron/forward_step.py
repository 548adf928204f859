"""PEAR's forward step: what a Megatron training loop calls for every micro-batch.

``PearForwardStep`` is what ``get_forward_backward_func()`` takes as ``forward_step_func``: this package's loop
calls it, and so do the loops that ``pear_megatron.adapters`` has an adapter for. Where mcore has
``GPTModel.forward(output_processor=...)`` (0.19+) the loss is computed there, straight from the output
layer's [s, b, V/tp] logits; otherwise from the logits that the model returns for ``labels=None``. With
``output_chunk_tokens`` there are no logits but those of a chunk of tokens (output_chunks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pear_megatron.alignment_watch import AlignmentWatch
from pear_megatron.config import PearConfig
from pear_megatron.data.batches import PackedBatch
from pear_megatron.errors import RecipeError
from pear_megatron.loss import Normalization, loss_of_logprobs, topk_of
from pear_megatron.megatron.attention import check_rows_stay_apart
from pear_megatron.megatron.model import unwrap, wraps_precision
from pear_megatron.megatron.output_chunks import (
    require_output_processor,
    statistics_in_chunks,
    supports_output_processor,
)
from pear_megatron.ops.arguments import require_config
from pear_megatron.ops.statistics import TokenStatistics, vocab_parallel_statistics
from pear_megatron.report import ReportWatch

LossOutput = tuple[Tensor, Tensor, dict[str, Tensor]]


def _flat(x: Tensor | None) -> Tensor | None:
    """[B, S] -> [B * S]."""
    return None if x is None else x.view(-1)


def _groups_of(model: Any) -> tuple[torch.distributed.ProcessGroup, torch.distributed.ProcessGroup]:
    """The tensor- and the context-parallel group that a model was built with, or else Megatron's own."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_attr_wrapped_model

    try:
        groups = get_attr_wrapped_model(model, "pg_collection", allow_none=False)
        return groups.tp, groups.cp
    except (RuntimeError, AttributeError):
        return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()


def _speaks(tp_group: torch.distributed.ProcessGroup) -> bool:
    """Whether this is the one of the ranks with the loss that warns."""
    from megatron.core import parallel_state

    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    return first and tp_group.rank() == 0


def _gathers(model: Any) -> bool:
    """Whether the output layer puts the vocabulary's parts together; False on a stage without one."""
    layer = getattr(unwrap(model), "output_layer", None)
    return bool(getattr(layer, "gather_output", False)) or not getattr(unwrap(model), "parallel_output", True)


class PearForwardStep:
    """``forward_step_func`` for Megatron-Core's schedules, under ``calculate_per_token_loss=True``.

    Args:
        config: how the loss is reweighted.
        vocab_size: real tokens; columns beyond are Megatron's padding.
        tp_group: tensor-parallel group of the model; None = what the model says when the first batch comes.
        cp_group: ranks that share each sequence in zigzag chunks; the batches are this rank's shards. None =
            what the model says.
        packed_attention: how trajectories of a row stay apart. ``mask`` gives the model a block-diagonal attention
            mask, which Megatron's local layer spec looks at; ``thd`` gives ``PackedSeqParams`` and one flat row of
            tokens: for Transformer Engine's layer spec. A model that would not heed it is refused.
        use_output_processor: None = where mcore has it.
        normalization: what the loss is divided by, see pear_loss.
        num_sources: the report tells so many sources of the batches apart; 0 = none.
        output_chunk_tokens: compute the output layer for so many tokens at a time and never hold all logits;
            None = all at once.
        watch: warn of weights that collapse or grow, on the first data-parallel rank's data: for loops that show
            the means to nobody who would.
        check_alignment: refuse log-probs of the data that belong to other tokens, in the first micro-batches (see
            AlignmentWatch): for loops that do not look before they start.

    Raises:
        ValueError, TypeError: output_chunk_tokens without the output processor; arguments of another kind.
        DataError: when called, where check_alignment finds a shift.
        RecipeError: when called: output_chunk_tokens with a model that it does not work with, or a model
            whose config does not say ``calculate_per_token_loss``; ``base_loss: kl`` with data without a top-k.
    """

    def __init__(
        self,
        config: PearConfig,
        *,
        vocab_size: int,
        tp_group: torch.distributed.ProcessGroup | None = None,
        cp_group: torch.distributed.ProcessGroup | None = None,
        packed_attention: str = "mask",
        use_output_processor: bool | None = None,
        output_chunk_tokens: int | None = None,
        normalization: Normalization = "token",
        num_sources: int = 0,
        watch: bool = False,
        check_alignment: bool = False,
    ) -> None:
        require_config(config)
        if not isinstance(vocab_size, int):
            raise TypeError(f"vocab_size must be the model's number of real tokens, got {vocab_size!r}")
        if packed_attention not in ("mask", "thd"):
            raise ValueError(f"packed_attention must be 'mask' or 'thd', got {packed_attention!r}")
        if output_chunk_tokens is not None and use_output_processor is False:
            raise ValueError(
                "output_chunk_tokens works through the output processor; leave one of the two out"
            )
        self.config = config
        self.vocab_size = vocab_size
        self.tp_group = tp_group
        self.cp_group = cp_group
        self.packed_attention = packed_attention
        self.use_output_processor = use_output_processor
        self.output_chunk_tokens = output_chunk_tokens
        self.normalization = normalization
        self.num_sources = num_sources
        self._watch = ReportWatch(config) if watch else None
        self._alignment = AlignmentWatch(config) if check_alignment else None
        self._routes = self._predicts_further = False
        self._met = False

    def __call__(
        self, data_iterator: Iterator[PackedBatch], model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[[Tensor], LossOutput]]:
        """Runs the model on the next micro-batch; returns its output and the loss function for it.

        With ``return_schedule_plan`` (Megatron's overlap of expert-parallel communication) the model's schedule
        plan stands for the output.
        """
        batch = next(data_iterator)
        if not isinstance(batch, PackedBatch):
            raise TypeError(
                "the data iterator must yield PackedBatch (pear_megatron.data.collate makes them), got "
                f"{type(batch).__name__}"
            )
        if not self._met:
            self._meet(model)
        if self.config.base_loss == "kl" and batch.behavior_topk is None:
            raise RecipeError(
                "pear.base_loss: kl needs the behaviour policy's top-k, and the batch has none: score the data with "
                "`pear-megatron score --top-k K`, or set pear.base_loss: nll"
            )
        inputs = self._inputs(batch)
        run = model.build_schedule_plan if return_schedule_plan else model
        if wraps_precision(model):
            inputs["fp32_output"] = False  # the loss reads bf16 logits; a float32 copy is not needed
        if not self.use_output_processor:
            return run(**inputs), lambda logits: self.loss(logits, batch)

        results: list[LossOutput] = []

        def processor(
            *, hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, **_: Any
        ) -> Tensor:
            if self.output_chunk_tokens is None:
                logits, _bias = output_layer(hidden_states, weight=output_weight)  # [s, b, V/tp]
                results.append(self.loss(scale_logits(logits).transpose(0, 1), batch))
            else:
                found = statistics_in_chunks(
                    hidden_states,
                    output_layer,
                    output_weight,
                    batch,
                    self.config,
                    chunk_tokens=self.output_chunk_tokens,
                    vocab_size=self.vocab_size,
                    tp_group=self.tp_group,
                )
                results.append(self.loss_of_statistics(found, batch))
            return results[0][0]

        output = run(**inputs, output_processor=processor)
        return output, lambda loss_sum: (loss_sum, *results[0][1:])

    def _meet(self, model: Any) -> None:
        """What the first batch asks of the model: its groups, and whether the loop divides as it must."""
        from megatron.core.utils import get_model_config

        model_config = get_model_config(model)
        if not model_config.calculate_per_token_loss:
            raise RecipeError(
                "the model's config has calculate_per_token_loss false: every micro-batch would count alike, however "
                "few decisions it holds; set it to true (Megatron-LM: --calculate-per-token-loss)"
            )
        check_rows_stay_apart(model, self.packed_attention)
        tp_group, cp_group = _groups_of(model)
        self.tp_group = tp_group if self.tp_group is None else self.tp_group
        self.cp_group = cp_group if self.cp_group is None else self.cp_group
        if self.tp_group.size() > 1 and _gathers(model):
            raise RecipeError(
                "the model gathers its logits (parallel_output False): every rank would hold all of the vocabulary, "
                "and only the first one's part of the output layer would train; build it with parallel_output True"
            )
        shared, cp_size = (
            1 if self.cp_group is None else self.cp_group.size(),
            model_config.context_parallel_size,
        )
        if shared != cp_size:
            raise RecipeError(
                f"the model's config has context_parallel_size {cp_size} and its context-parallel group {shared} "
                "rank(s): weights would be those of pieces of trajectories; give cp_group, or build the model with its "
                "process groups"
            )
        if self.use_output_processor is None:
            self.use_output_processor = supports_output_processor(model)
        if self.output_chunk_tokens is not None:
            require_output_processor(model)
        self._routes = model_config.num_moe_experts is not None
        self._predicts_further = bool(getattr(model_config, "mtp_num_layers", None))
        if cp_size > 1:
            self._alignment = None  # neighbouring tokens of a shard are not neighbours
        if not _speaks(self.tp_group):
            self._watch = None
        self._met = True

    def loss(self, logits: Tensor, batch: PackedBatch) -> LossOutput:
        """pear_loss of a micro-batch: [B, S, V/tp] logits (or one flat row) -> Megatron's loss tuple."""
        topk, mask = batch.behavior_topk, batch.loss_mask.view(logits.shape[:-1])
        flat = None if topk is None else (topk[0].flatten(0, 1), topk[1].flatten(0, 1))
        found = vocab_parallel_statistics(
            logits,
            batch.labels.view(mask.shape),
            topk=topk_of(self.config, flat, mask=mask),
            tail=self.config.kl_tail,
            entropy=self.config.needs_entropy,
            mask=mask,
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
            inplace_backward=True,
        )
        return self.loss_of_statistics(found, batch)

    def loss_of_statistics(self, found: TokenStatistics, batch: PackedBatch) -> LossOutput:
        """The same from what is [B, S] or [B * S] each, 0 off the mask."""
        given = (found.logprob, batch.behavior_logprobs, batch.loss_mask.view(-1), batch.cu_seqlens)
        if self._alignment is not None:
            self._alignment(*given, reference_logprobs=batch.reference_logprobs)
        output = loss_of_logprobs(
            *given,
            self.config,
            kl=found.kl,
            entropy=found.entropy,
            **self._of_trajectories(batch),
            token_weights=_flat(batch.token_weights),
            reference_logprobs=_flat(batch.reference_logprobs),
            cp_group=self.cp_group,
        )
        if self._watch is not None:
            self._watch(output[2])
        return output

    def _of_trajectories(self, batch: PackedBatch) -> dict[str, Any]:
        """What the loss takes of each trajectory, and how it counts them."""
        return {
            "reward": batch.reward,
            "normalization": self.normalization,
            "source": batch.source if self.num_sources else None,
            "num_sources": self.num_sources,
        }

    def _inputs(self, batch: PackedBatch) -> dict[str, Any]:
        inputs = self._attention(batch)
        shape = inputs["input_ids"].shape
        if self._routes:
            inputs["padding_mask"] = batch.padding_mask.view(shape)
        if self._predicts_further:  # the multi-token heads' own loss, which goes its own way
            inputs |= {"labels": batch.labels.view(shape), "loss_mask": batch.loss_mask.view(shape)}
        return inputs

    def _attention(self, batch: PackedBatch) -> dict[str, Any]:
        if self.packed_attention == "mask":
            return {
                "input_ids": batch.tokens,
                "position_ids": batch.position_ids,
                "attention_mask": batch.attention_mask(),
            }
        from megatron.core.packed_seq_params import PackedSeqParams

        # A segment's padding is at its end, where nothing real sees it: to attention it is part of the segment.
        # Boundaries given as real and as padded let every TE backend run (few take padding between segments).
        padded = {}
        if self.cp_group is not None and self.cp_group.size() > 1:
            padded = {"cu_seqlens_q_padded": batch.cu_seqlens, "cu_seqlens_kv_padded": batch.cu_seqlens}
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            **padded,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        return {
            "input_ids": batch.tokens.view(1, -1),
            "position_ids": batch.position_ids.view(1, -1),
            "attention_mask": None,
            "packed_seq_params": packed,
        }
