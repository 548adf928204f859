"""The likeliest tokens that an engine recorded at each decision, as behavior_topk_ids and behavior_topk_logprobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pear_megatron.data.columns import TOPK_IDS, TOPK_LOGPROBS
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import short
from pear_megatron.score.recorded.tokens import id_in

# Of each token {id: log-prob}, None where nothing was recorded; read only if it is asked for.
Entries = Callable[[], Sequence[Mapping[int, float] | None]]
ENTRIES = "recorded_topk"  # where a row has its Entries until ordinary_fields reads them
_NO_LOGPROB = -9999.0  # vLLM's word for a token without probability
_ASK = "logprobs=K or prompt_logprobs=K (vLLM), top_logprobs_num=K (SGLang)"


def topk_fields(row: Mapping[str, Any], entries: Entries | None, k: int) -> dict[str, Any]:
    """The two columns of a row: at each decision the k likeliest recorded tokens, and the token that is there.

    Args:
        row: input_ids, loss_mask and behavior_logprobs.
        entries: of its last tokens, as many as there are; None = the form has none.
        k: at least 1.

    Raises:
        RowProblem: a decision with fewer than k recorded tokens, or tokens that are named by their text.
    """
    if entries is None:
        if TOPK_IDS in row:
            return {}
        raise RowProblem(f"the row has no recorded top-k: ask the engine for {_ASK}, or leave --top-k out")
    found = entries()
    offset = len(row["input_ids"]) - len(found)
    ids: list[list[int] | None] = [None] * len(row["input_ids"])
    logprobs: list[list[float] | None] = [None] * len(ids)
    for i, (token_id, decision) in enumerate(zip(row["input_ids"], row["loss_mask"], strict=True)):
        if not decision:
            continue
        own = found[i - offset] if i >= offset else None
        if own is None or len(own) < k:
            count = 0 if own is None else len(own)
            raise RowProblem(
                f"input_ids[{i}] was recorded with {count} of its likeliest tokens, and --top-k asks for {k}: ask "
                f"the engine for {_ASK}, or give a lower --top-k"
            )
        ordered = sorted(own.items(), key=lambda entry: -entry[1])
        kept = {token: value for token, value in ordered[:k] if value > _NO_LOGPROB}
        kept.setdefault(token_id, own.get(token_id, row["behavior_logprobs"][i]))
        ids[i], logprobs[i] = list(kept), list(kept.values())
    return {TOPK_IDS: ids, TOPK_LOGPROBS: logprobs}


def of_pairs(pairs: Any, place: str) -> dict[int, float] | None:
    """Entries of a list of (token, log-prob); null is None.

    A token is an id, or ``token_id:N``; RowProblem for a text, which several ids may share.
    """
    if pairs is None:
        return None
    found: dict[int, float] = {}
    for token, value in pairs:
        token_id = id_in(token) if isinstance(token, str) else token
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise RowProblem(
                f"{place} names the token {short(token)} by its text, which other ids may share: have the server write "
                "ids, return_tokens_as_token_ids=true (vLLM) or the endpoint /generate (SGLang)"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise RowProblem(
                f"{place} gives the token {token_id} the log-prob {short(value)}, which is no number"
            )
        found[token_id] = float(value)
    return found
