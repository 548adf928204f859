"""PearLoss: PEAR as a loss function of NeMo-RL, for those who run SFT there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pear_megatron.alignment_watch import AlignmentWatch
from pear_megatron.config import PearConfig
from pear_megatron.data.columns import REFERENCE, require_supported
from pear_megatron.loss import loss_of_logprobs, report_keys

_PER_SEQUENCE = "pear/effective_sample_size"


class PearLoss:
    """The reweighted SFT loss behind NeMo-RL's ``LossFunction`` (docs/method.md, Loss).

    NeMo-RL hands it log-probs with sequence packing undone and tensor and context parallelism gathered, one
    sequence or a padded batch of them at a time; each row is one trajectory. With ``variant: none`` and without
    rewards it is NeMo-RL's ``NLLLossFn``.

    Args:
        config: how the loss is reweighted.
        use_fused_linear_logprobs: as NeMo-RL's NLLLossFn takes it: policy.megatron_cfg.use_fused_linear_logprobs.

    Raises:
        ImportError: NeMo-RL is not importable.
        RecipeError: the config asks for what NeMo-RL does not give (see require_supported).
    """

    def __init__(self, config: PearConfig, *, use_fused_linear_logprobs: bool = False) -> None:
        from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer

        require_supported(config, "NeMo-RL's loop", carries=(REFERENCE,))
        self.config = config
        self._check_alignment = AlignmentWatch(config)
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.loss_type = LossType.TOKEN_LEVEL
        self.input_type = LossInputType.LOGPROB
        per_sequence = {_PER_SEQUENCE: MetricNormalizer.SEQUENCES}
        counts = dict.fromkeys(("num_unmasked_tokens", "num_valid_samples"), MetricNormalizer.NONE)
        per_token = dict.fromkeys(report_keys(config), MetricNormalizer.TOKENS)
        self.metric_normalizations = per_token | per_sequence | counts

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a micro-batch, or of one sequence of a pack, divided by the global number of decisions.

        Args:
            next_token_logprobs: [B, S - 1] float32; entry i is of token i + 1.
            data: NeMo-RL's micro-batch: ``token_mask`` [B, S] and ``sample_mask`` [B], and
                ``behavior_logprobs`` [B, S] float32, aligned with ``input_ids`` (only ``variant: none`` does without);
                optionally ``reward`` [B], default 1, and ``reference_logprobs`` [B, S] (``ratio: reference`` needs it).
            global_valid_seqs, global_valid_toks: sequences and decisions of the global batch.

        Returns:
            The loss, a scalar, and metrics that NeMo-RL adds over micro-batches and ranks; ``pear/negative_stopped`` is
            a share of all decisions here.

        Raises:
            ValueError: no ``behavior_logprobs``, or shapes or dtypes that do not fit.
            DataError: log-probs that belong to other tokens (see AlignmentWatch).
        """
        token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
        mask = (token_mask * sample_mask[:, None]).bool()  # [B, S - 1]
        rows, length = mask.shape
        boundaries = torch.arange(rows + 1, dtype=torch.int32, device=mask.device) * length
        given = (next_token_logprobs.flatten(), self._behavior(data), mask.flatten(), boundaries)
        reference = self._shifted(data, "reference_logprobs")
        self._check_alignment(*given, reference_logprobs=reference)
        loss_sum, num_tokens, report = loss_of_logprobs(
            *given, self.config, reference_logprobs=reference, reward=data.get("reward")
        )
        values = [
            total / (global_valid_seqs if name == _PER_SEQUENCE else global_valid_toks)
            for name, (total, _) in report.items()
        ]
        *values, tokens, samples = torch.stack(
            [*values, num_tokens, sample_mask.sum()]
        ).tolist()  # one transfer
        metrics = dict(zip(report, values, strict=True))
        counts = {"num_unmasked_tokens": int(tokens), "num_valid_samples": samples}
        return loss_sum / global_valid_toks, metrics | counts

    def _behavior(self, data: Mapping[str, Any]) -> Tensor | None:
        """[B * (S - 1)] behaviour log-probs, entry by entry those of ``next_token_logprobs``."""
        behavior = self._shifted(data, "behavior_logprobs")
        if behavior is None and self.config.variant != "none" and self.config.ratio == "behavior":
            raise ValueError(
                f"variant {self.config.variant!r} needs data['behavior_logprobs'], [B, S] aligned with input_ids; only "
                "'none' does without"
            )
        return behavior

    @staticmethod
    def _shifted(data: Mapping[str, Any], name: str) -> Tensor | None:
        """[B, S] -> [B * (S - 1)], aligned with the predictions, where the data have it."""
        x = data.get(name)
        return None if x is None else x[:, 1:].flatten()
