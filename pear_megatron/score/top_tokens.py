"""top_tokens: the likeliest tokens of each decision from vocabulary-sharded logits, which are never gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from pear_megatron.data.batches import PackedBatch
from pear_megatron.ops.context_parallel import all_gather

_ROWS = 512  # of logits in float32 at a time


@torch.no_grad()
def top_tokens(
    logits: Tensor,
    batch: PackedBatch,
    logprobs: Tensor,
    k: int,
    *,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of every decision, and the label where it is none of them, with their log-probs.

    Each rank takes the k likeliest of its columns; only those and a float32 per decision are gathered.

    Args:
        logits: [B, S, V_local] floating; rank r of n holds columns [r * V_local, (r + 1) * V_local).
        batch: whose labels and mask they belong to.
        logprobs: [B, S] float32, of the labels.
        k: at least 1; a vocabulary that is smaller gives all of its tokens.
        tp_group: ranks that share the vocabulary; None = whole.
        vocab_size: real tokens; columns beyond are padding.

    Returns:
        ids: int32 [decisions, k + 1], in the batch's order; -1 = no entry.
        logprobs: float32 [decisions, k + 1], normalised over the real tokens of all ranks.
    """
    ranks, rank = (1, 0) if tp_group is None else (tp_group.size(), tp_group.rank())
    local = logits.shape[-1]
    start = rank * local
    real = local if vocab_size is None else min(max(vocab_size - start, 0), local)
    rows, positions = batch.loss_mask.nonzero(as_tuple=True)
    found = []
    for chosen in zip(rows.split(_ROWS), positions.split(_ROWS), strict=True):
        own = logits[..., :real][chosen].float()  # [n, real]
        normaliser = own.logsumexp(-1)  # -inf where a rank holds padding alone
        values = own.new_full((len(own), k), -torch.inf)
        ids = torch.full_like(values, -1, dtype=torch.int64)
        if real:
            top = own.topk(min(k, real), dim=-1)
            values[:, : top.values.shape[1]], ids[:, : top.indices.shape[1]] = top.values, top.indices + start
        if tp_group is not None and ranks > 1:
            normaliser = all_gather(normaliser, tp_group).logsumexp(0)
            values = all_gather(values, tp_group).permute(1, 0, 2).flatten(1)  # [n, ranks * k]
            ids = all_gather(ids, tp_group).permute(1, 0, 2).flatten(1)
            values, places = values.topk(k, dim=-1)
            ids = ids.gather(1, places)
        found.append(_with_label(ids, values - normaliser[:, None], batch.labels[chosen], logprobs[chosen]))
    if not found:
        return batch.labels.new_empty(0, k + 1).int(), logprobs.new_empty(0, k + 1)
    return torch.cat([ids for ids, _ in found]).int(), torch.cat([values for _, values in found])


def _with_label(ids: Tensor, values: Tensor, label: Tensor, logprob: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] -> [n, k + 1]: the label's entry has exactly its log-prob, and is added where it is missing."""
    ids = ids.masked_fill(values == -torch.inf, -1)
    is_label = ids == label[:, None]
    values = torch.where(is_label, logprob[:, None], values)
    extra = torch.where(is_label.any(-1), -1, label)
    values = torch.cat([values, logprob[:, None]], dim=1)
    return torch.cat([ids, extra[:, None]], dim=1), values
