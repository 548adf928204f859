"""Trajectory: a prompt and a response as token ids, with what the behaviour policy thought of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pear_megatron.data.topk import TopK


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One offline trajectory of n tokens (docs/method.md, Words), not shifted.

    Attributes:
        id: the row's ``id``, or ``FILE:LINE``; with ``#0``, ``#1``, ... where each assistant turn of the row is a
            trajectory.
        input_ids: int32 [n].
        loss_mask: bool [n], True on decisions; never at 0, which has no context to be predicted from.
        behavior_logprobs: float32 [n], entry i is log pi_beta(input_ids[i] | input_ids[:i]); 0 off the
            decisions.
        reward: finite; below 0 for a negative example.
        token_weights: float32 [n], a factor of each decision's weight, 0 off the decisions; None = 1 on all.
        source: which of a blend's sources it comes from, from 0.
        behavior_topk: the behaviour policy's likeliest tokens at each decision; None = not known, or not needed.
        reference_logprobs: float32 [n], as behavior_logprobs, of the initial model; None = not known, or not needed.
    """

    id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    behavior_logprobs: np.ndarray
    reward: float = 1.0
    token_weights: np.ndarray | None = None
    source: int = 0
    behavior_topk: TopK | None = None
    reference_logprobs: np.ndarray | None = None
