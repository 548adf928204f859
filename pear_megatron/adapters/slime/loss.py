"""The loss of one of slime's micro-batches, and what it needs to know of a rollout before its first."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pear_megatron.adapters.slime.layout import Layout
from pear_megatron.adapters.slime.settings import SlimeSettings, check_loss_arguments, settings
from pear_megatron.alignment_watch import AlignmentWatch
from pear_megatron.errors import RecipeError
from pear_megatron.loss import loss_of_logprobs, report_keys
from pear_megatron.ops.statistics import vocab_parallel_logprob
from pear_megatron.report import WeightWatch

# slime hands the loss a fixed set of fields. This one is free, since its own advantages are switched off.
_REWARDS = "advantages"


class _Run:
    """The training steps of this process as their micro-batches come by, and their reports."""

    def __init__(self, config: SlimeSettings) -> None:
        self.config = config
        self._keys = report_keys(config)
        self._watch = WeightWatch(config)
        self.check_alignment = AlignmentWatch(config)
        self._step = 0
        self._left: list[int] = []  # micro-batches of each of the rollout's steps to come
        self._sums: Tensor | None = None  # [keys, 2] float64, of this step so far

    def begin(self, rollout_id: int, micro_batches: list[int]) -> None:
        """A rollout's steps have so many micro-batches on this rank."""
        self._step = rollout_id * len(micro_batches)  # as slime counts them
        self._left, self._sums = list(micro_batches), None

    def report(self, report: dict[str, Tensor]) -> dict[str, float]:
        """What slime is to add up for a micro-batch: nothing until the step's last, and the step's means with that.

        slime adds the values of all micro-batches and ranks, and divides by the number of decisions. Means over
        trajectories (the effective sample size) are no sums over decisions, so the step's sums are reduced here.
        """
        from megatron.core import parallel_state

        pairs = torch.stack([report[key] for key in self._keys]).double()
        self._sums = pairs if self._sums is None else self._sums + pairs
        self._left[0] -= 1
        if self._left[0]:
            return dict.fromkeys(self._keys, 0.0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(self._sums, group=group)
        sums = dict(zip(self._keys, self._sums.tolist(), strict=True))
        del self._left[0]
        self._step, self._sums = self._step + 1, None
        decisions = sums["loss"][1]
        means = {key: total / count if count else 0.0 for key, (total, count) in sums.items()}
        if group.rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0:
            self._watch({"step": self._step, "decisions": decisions, **means})
        return {key: mean * decisions / group.size() for key, mean in means.items()}


_run: _Run | None = None


def postprocess_rollout_data(args: argparse.Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """``--rollout-data-postprocess-path``: puts the samples' rewards where the loss finds them.

    Called on every rank before a rollout is trained on. Takes the rewards as the samples have them, sign and size:
    what slime's normalisation makes of them (0 for groups of one) is not used.

    Args:
        args: slime's arguments.
        rollout_id: of the rollout.
        rollout_data: this rank's samples; gains ``advantages``, float32 per response token of this rank.

    Raises:
        RecipeError: arguments that would spoil the loss, or bad settings.
        ValueError: samples without log-probs, without decisions, or with a reward that is no number.
    """
    global _run
    config = settings(args)
    check_loss_arguments(args)
    logprobs, rewards = rollout_data.get("rollout_log_probs"), rollout_data["local_raw_reward"]
    if logprobs is None:
        raise ValueError(
            f"rollout {rollout_id}: the samples have no rollout_log_probs, the log-probs of the policy that wrote "
            "them; set Sample.rollout_log_probs, or take pear_megatron.adapters.slime.generate_rollout"
        )
    decisions = torch.stack([mask.sum() for mask in rollout_data["loss_masks"]]).tolist()
    for sample, reward, count in zip(rollout_data["sample_indices"], rewards, decisions, strict=True):
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            raise ValueError(
                f"rollout {rollout_id}: the reward of sample {sample} is {reward!r}, no finite number"
            )
        if not count:
            raise ValueError(
                f"rollout {rollout_id}: sample {sample} has no token on its loss mask, which slime counts as one "
                "decision; leave the sample out"
            )
    rollout_data[_REWARDS] = [torch.full_like(lp, r) for lp, r in zip(logprobs, rewards, strict=True)]
    if _run is None or _run.config != config:
        _run = _Run(config)
    _run.begin(rollout_id, rollout_data["num_microbatches"])


def loss_function(
    args: argparse.Namespace, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
) -> tuple[Tensor, dict[str, float]]:
    """``--custom-loss-function-path``: PEAR's loss of a micro-batch (docs/method.md, Loss).

    slime multiplies it by the context-parallel size and counts the decisions of a sample on each of its
    context-parallel ranks; Megatron adds the gradients and divides by that count. What is left is PEAR's loss over
    the decisions of the global batch.

    Args:
        args: slime's arguments.
        batch: slime's micro-batch (``get_batch`` in slime/backends/megatron_utils/data.py).
        logits: [1, T, V / TP] floating, T = this rank's positions with slime's padding; backward writes over them.
        sum_of_sample_mean: slime's reduction, not used.

    Returns:
        the sum over this rank's decisions, float32 scalar, and the values that slime adds up for its report.

    Raises:
        RecipeError: the rollout did not pass ``postprocess_rollout_data``.
        DataError: log-probs of the samples that belong to other tokens.
        ValueError: the micro-batch is not what slime's get_batch makes of samples, or see ``pear_loss``.
    """
    if _run is None or batch.get(_REWARDS) is None:
        raise RecipeError(
            "PEAR needs --rollout-data-postprocess-path pear_megatron.adapters.slime.postprocess_rollout_data: it "
            "carries the rewards to the loss"
        )
    from megatron.core import parallel_state as mpu

    cp_size = mpu.get_context_parallel_world_size()
    layout = Layout.of(
        batch["total_lengths"],
        batch["response_lengths"],
        cp_rank=mpu.get_context_parallel_rank(),
        cp_size=cp_size,
    )
    behavior, reward = torch.cat(batch["rollout_log_probs"]), torch.cat(batch[_REWARDS])
    padding = logits.shape[1] - layout.length
    if (
        logits.shape[:2] != batch["full_loss_masks"].shape
        or padding < 0
        or layout.scoring.numel() != behavior.numel()
    ):
        raise ValueError(
            f"a micro-batch of {layout.length} positions here, {layout.scoring.numel()} of them scoring response "
            f"tokens, came with logits {tuple(logits.shape)}, masks {tuple(batch['full_loss_masks'].shape)} and "
            f"{behavior.numel()} log-probs: slime slices it in another way than at commit 624b824a8"
        )
    device = logits.device
    scoring = layout.scoring.to(device, non_blocking=True)
    target = torch.cat(batch["unconcat_tokens"])[layout.following.to(device, non_blocking=True)]
    mask = batch["full_loss_masks"].bool()  # [1, T]: position p's says whether it predicts a decision
    logprob = vocab_parallel_logprob(
        logits,
        F.pad(target, (0, padding))[None],
        mask=mask,
        tp_group=mpu.get_tensor_model_parallel_group(),
        vocab_size=args.vocab_size,
        inplace_backward=True,
    )[0, : layout.length]
    behavior = behavior.new_zeros(layout.length).index_copy(0, scoring, behavior)
    given = (logprob, behavior, mask[0, : layout.length], layout.cu_seqlens)
    if cp_size == 1:
        _run.check_alignment(*given)
    loss_sum, _, report = loss_of_logprobs(
        *given,
        _run.config,
        reward=reward.new_ones(layout.length).index_copy(0, scoring, reward),
        cp_group=mpu.get_context_parallel_group() if cp_size > 1 else None,
    )
    return loss_sum, _run.report(report)
