"""PEAR's loss as verl calls its loss functions, and what it reports; needs no verl to import.

verl's engines hand a loss function the log-probs of a micro-batch's sequences, whole on every rank that shares them
(tensor- and context-parallel parts are put together before), and divide by nothing themselves: the function's result
is summed over micro-batches and averaged over the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pear_megatron.alignment_watch import AlignmentWatch
from pear_megatron.config import PearConfig
from pear_megatron.data.columns import REFERENCE, require_supported
from pear_megatron.data.errors import DataError
from pear_megatron.errors import RecipeError
from pear_megatron.loss import REPORT_KEYS, loss_of_logprobs, report_keys

REPORT = "pear/report"


class PearSFTLoss:
    """What ``TrainingWorker.set_loss_fn`` takes; docs/adapters/verl.md, The loss.

    Called with verl's ``model_output`` and micro-batch (a TensorDict). Jagged tensors are [B, j], j the tokens of each
    trajectory:

    - ``log_probs`` float32: entry i is the log-probability of token i + 1; the last of each trajectory is of no token.
    - ``loss_mask``: entry i is 1 where token i is a decision, 0 at the first token. Shifted here, in the trajectory.
    - ``behavior_logprobs``, ``reward``, and optionally ``token_weights`` and ``reference_logprobs``, float32: aligned
      with the tokens as well.
    - ``batch_num_tokens``, ``dp_size``: decisions of the global batch and data-parallel ranks, from verl's engine.

    Args:
        config: how the loss is reweighted.

    Returns:
        loss: scalar float32, this micro-batch's loss_sum x dp_size / batch_num_tokens.
        metrics: the report as a list of numbers, for ``reduce_reports``.

    Raises:
        DataError: a column is missing, or does not fit the tokens; log-probs that belong to other tokens.
        RecipeError: log_probs are not float32, or the config asks for what verl does not give (see require_supported).
    """

    def __init__(self, config: PearConfig) -> None:
        require_supported(config, "verl", carries=(REFERENCE,))
        self.config = config
        self._check_alignment = AlignmentWatch(config)

    def __call__(
        self, model_output: Mapping[str, Any], data: Any, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, list[float]]]:
        """A micro-batch\'s loss and report; see the class."""
        log_probs = model_output["log_probs"]
        if not log_probs.is_nested:
            raise RecipeError("verl gives padded log-probs; PEAR reads data.pad_mode=no_padding")
        if log_probs.dtype != torch.float32:
            raise RecipeError(
                f"verl's log-probs are {log_probs.dtype}, whose rounding is as large as the log ratios that PEAR takes "
                "of them; install flash-attn (its cross entropy is float32), use the Megatron engine, or train with "
                "engine.mixed_precision.param_dtype=fp32"
            )
        cu_seqlens = log_probs.offsets()
        with torch.autocast(log_probs.device.type, enabled=False):
            mask = _next_token(_column(data, "loss_mask", cu_seqlens).bool(), cu_seqlens)
            behavior = reward = token_weights = reference = None
            if self.config.variant != "none" or "behavior_logprobs" in data:
                behavior = _next_token(_column(data, "behavior_logprobs", cu_seqlens), cu_seqlens)
            if "reward" in data:
                reward = _column(data, "reward", cu_seqlens)
            if "token_weights" in data:
                token_weights = _next_token(_column(data, "token_weights", cu_seqlens), cu_seqlens)
            if self.config.ratio == "reference" or REFERENCE in data:
                reference = _next_token(_column(data, REFERENCE, cu_seqlens), cu_seqlens)
            given = (_flat(log_probs), behavior, mask, cu_seqlens)
            self._check_alignment(*given, reference_logprobs=reference)
            loss_sum, _, report = loss_of_logprobs(
                *given,
                self.config,
                reward=reward,
                token_weights=token_weights,
                reference_logprobs=reference,
            )
        loss = loss_sum * (data["dp_size"] / max(data["batch_num_tokens"], 1))
        return loss, {
            REPORT: torch.stack([report[key] for key in report_keys(self.config)]).flatten().tolist()
        }


def reduce_reports(gathered: Any, keys: Sequence[str] = REPORT_KEYS) -> dict[str, float]:
    """The reports of all micro-batches and data-parallel ranks -> name -> ratio of global sums.

    Args:
        gathered: the numbers of any number of reports, nested in lists as verl gathers them.
        keys: what a report holds: report_keys(config).

    Returns:
        ``loss``, ``nll``, ``pear/...`` and ``decisions``; 0 where nothing was counted.
    """
    sums, counts = (
        np.concatenate([np.ravel(part) for part in _leaves(gathered)]).reshape(-1, len(keys), 2).sum(0).T
    )
    ratios = np.divide(sums, counts, out=np.zeros_like(sums), where=counts != 0)
    return {**dict(zip(keys, ratios.tolist(), strict=True)), "decisions": float(counts[0])}


def _leaves(gathered: Any) -> list[Any]:
    """[rank][number] or [number] -> the lists of numbers, which may differ in length."""
    return (
        [gathered]
        if not isinstance(gathered[0], list)
        else [leaf for part in gathered for leaf in _leaves(part)]
    )


def _flat(x: Any) -> Tensor:
    """Jagged [B, j] -> [T], sequence after sequence."""
    return x.values() if x.lengths() is None else torch.cat(x.unbind())


def _column(data: Any, name: str, cu_seqlens: Tensor) -> Tensor:
    if name not in data:
        raise DataError(
            [f"the batch has no {name}: data.custom_cls must be a dataset that gives it, as "
             "pear_megatron.adapters.verl.data.PearDataset does"]
        )  # fmt: skip
    column = data[name]
    if not column.is_nested:
        raise DataError(
            [f"{name} is a dense {tuple(column.shape)} tensor; give a jagged one, a number per token"]
        )
    flat = _flat(column)
    if not torch.equal(
        column.offsets().diff() if column.lengths() is None else column.lengths(), cu_seqlens.diff()
    ):
        raise DataError(
            [f"{name} has {flat.numel()} entries for {int(cu_seqlens[-1])} tokens, or shares them out among the "
             "trajectories in another way; give one per token"]
        )  # fmt: skip
    if name == "loss_mask" and not ((flat == 0) | (flat == 1)).all():
        raise DataError(["loss_mask must be 0 or 1; weights of tokens are token_weights"])
    if name == "loss_mask" and flat[cu_seqlens[:-1]].any():
        raise DataError(
            ["loss_mask marks the first token of a trajectory, which nothing predicts: verl would count it among the "
             "decisions; set it to 0"]
        )  # fmt: skip
    return flat


def _next_token(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Aligned with the tokens -> aligned with the log-probs: entry i is token i + 1's, 0 at each trajectory's end."""
    shifted = x.roll(-1)
    shifted[cu_seqlens[1:] - 1] = 0
    return shifted
