"""MegatronScorer: a Megatron-Core model, tensor-, pipeline- and data-parallel, with the package's own op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pear_megatron.data.batches import PackedBatch
from pear_megatron.data.topk import TopK
from pear_megatron.data.trajectory import Trajectory
from pear_megatron.ops.statistics import vocab_parallel_logprob
from pear_megatron.score.batches import in_place, length_batches, right_padded, topk_in_place
from pear_megatron.score.top_tokens import top_tokens


class MegatronScorer:
    """A Scorer on Megatron-Core: see ``backends.load_scorer``."""

    backend = "megatron"

    def __init__(
        self,
        model: str | Path,
        tensor_parallel: int,
        pipeline_parallel: int,
        dtype: str,
        max_tokens_per_batch: int,
    ) -> None:
        from pear_megatron.megatron.checkpoint.load_model import load_for_inference
        from pear_megatron.megatron.model import wraps_precision

        self._model, config, self._layout = load_for_inference(
            model, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, precision=dtype
        )
        self._vocab_size = config.vocab_size
        self._max_tokens = max_tokens_per_batch
        # The op reads bf16 logits; a float32 copy of them is not needed.
        self._options = {"fp32_output": False} if wraps_precision(self._model) else {}
        self.replica, self.num_replicas = self._layout.dp_rank, self._layout.dp_size
        self.writes = self._layout.is_first_stage and self._layout.tp_group.rank() == 0

    @torch.no_grad()
    def __call__(
        self, trajectories: Sequence[Trajectory], top_k: int = 0, *, on_tokens: Callable[[int], object] = int
    ) -> tuple[list[np.ndarray], list[TopK]]:
        """See Scorer."""
        from pear_megatron.megatron.schedule import run_schedule

        batches = length_batches([len(t.input_ids) for t in trajectories], self._max_tokens)
        if not batches:
            return [], []
        packed = [right_padded(trajectories, batch) for batch in batches]
        tokens = [sum(len(trajectories[i].input_ids) for i in batch) for batch in batches]
        rows, positions = packed[0].tokens.shape
        found = run_schedule(
            partial(self._forward_step, top_k=top_k, on_tokens=on_tokens),
            zip(packed, tokens, strict=True),
            [self._model],
            count=len(packed),
            shape=(rows, positions),
            forward_only=True,
            collect_non_loss_data=True,
        )
        shapes = [batch.tokens.shape for batch in packed]
        shared = self._from_last_stage([one[0] for one in found], shapes, torch.float32)
        scored = in_place(trajectories, batches, [rows.cpu().numpy() for rows in shared])
        if not top_k:
            return scored, []
        wide = [torch.Size((int(batch.loss_mask.sum()), top_k + 1)) for batch in packed]
        ids = self._from_last_stage([one[1] for one in found], wide, torch.int32)
        values = self._from_last_stage([one[2] for one in found], wide, torch.float32)
        entries = [(i.cpu().numpy(), v.cpu().numpy()) for i, v in zip(ids, values, strict=True)]
        return scored, topk_in_place(trajectories, batches, entries)

    def _forward_step(
        self,
        batches: Iterator[tuple[PackedBatch, int]],
        model: Any,
        *,
        top_k: int,
        on_tokens: Callable[[int], object],
    ) -> tuple[Tensor, Callable[..., list[Tensor]]]:
        batch, tokens = next(batches)
        batch = batch.to(self._layout.device, non_blocking=True)

        def score(logits: Tensor, non_loss_data: bool = True) -> list[Tensor]:  # of [B, S, V/tp]
            shards: dict[str, Any] = {"tp_group": self._layout.tp_group, "vocab_size": self._vocab_size}
            logprobs = vocab_parallel_logprob(logits, batch.labels, mask=batch.loss_mask, **shards)  # [B, S]
            top = top_tokens(logits, batch, logprobs, top_k, **shards) if top_k else ()
            return [logprobs, *(tensor.cpu() for tensor in top)]

        # No attention mask: Megatron's attention is causal by itself, and padding stands to the right.
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
        output = model(batch.tokens, positions, None, **self._options)
        on_tokens(tokens)
        return output, score

    def _from_last_stage(
        self, found: list[Tensor], shapes: Sequence[torch.Size], dtype: torch.dtype
    ) -> list[Tensor]:
        """The last pipeline stage's tensors, on every stage."""
        group = self._layout.pp_group
        if group.size() == 1:
            return found
        sizes = [shape.numel() for shape in shapes]
        flat = torch.empty(sum(sizes), dtype=dtype, device=self._layout.device)
        if self._layout.is_last_stage:
            flat.copy_(torch.cat([rows.flatten() for rows in found]))
        last = torch.distributed.get_global_rank(group, group.size() - 1)
        torch.distributed.broadcast(flat, src=last, group=group)
        return [rows.view(shape) for rows, shape in zip(flat.split(sizes), shapes, strict=True)]
