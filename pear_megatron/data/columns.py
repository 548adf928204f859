"""Columns: which optional numbers of a row a run reads, as its loss needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pear_megatron.config import PearConfig
from pear_megatron.errors import RecipeError

Need = Literal["no", "if_there", "required"]
TOPK_IDS, TOPK_LOGPROBS = "behavior_topk_ids", "behavior_topk_logprobs"
REFERENCE = "reference_logprobs"


@dataclass(frozen=True)
class Columns:
    """What is read of a row beside its tokens, its behavior_logprobs and its token_weights.

    A column that is read is in all rows or in none, except where it is required.

    Attributes:
        behavior_topk: ``behavior_topk_ids`` and ``behavior_topk_logprobs``.
        reference_logprobs: the field of that name.
    """

    behavior_topk: Need = "no"
    reference_logprobs: Need = "no"

    @classmethod
    def of(cls, pear: PearConfig) -> Columns:
        """What a loss reads. Columns that it does not need are neither checked nor kept."""
        reference: Need = "if_there" if pear.negative_floor is not None else "no"
        return cls(
            behavior_topk="required" if pear.base_loss == "kl" else "no",
            reference_logprobs="required" if pear.needs_reference else reference,
        )

    @property
    def unread(self) -> list[str]:
        """Names of the fields that are left alone."""
        names = [TOPK_IDS, TOPK_LOGPROBS] if self.behavior_topk == "no" else []
        return names + ([REFERENCE] if self.reference_logprobs == "no" else [])


NO_COLUMNS = Columns()
# Whatever is there is checked and kept.
ALL_COLUMNS = Columns(behavior_topk="if_there", reference_logprobs="if_there")


def require_supported(pear: PearConfig, loop: str, *, carries: tuple[str, ...] = ()) -> None:
    """Refuses what a loss cannot have in a loop that gives it log-probs, for want of the data's columns or of logits.

    ``loop`` is called as its users call it; ``carries`` are the columns that come through from the data to the loss.
    """
    columns = Columns.of(pear)
    reference = "ratio reference" if pear.ratio == "reference" else "dft_policy reference"
    lacks = [
        f"{key} needs {column}, which {loop} does not carry from the data to the loss"
        for key, column, need in (
            ("base_loss kl", TOPK_IDS, columns.behavior_topk),
            (reference, REFERENCE, columns.reference_logprobs),
        )
        if need == "required" and column not in carries
    ]
    if pear.needs_entropy:
        key = "entropy_power" if pear.entropy_power else "report_entropy"
        lacks.append(f"{key} needs logits, and {loop} gives the loss log-probs")
    if lacks:
        raise RecipeError(
            f"pear: {'; '.join(lacks)}; leave it out, or train with python -m pear_megatron.train"
        )


def needs_behavior_logprobs(pear: PearConfig) -> bool:
    """Whether a loss needs behavior_logprobs: in its ratios, or to see how far a negative example has fallen."""
    ratios = pear.variant != "none" and pear.ratio == "behavior"
    return ratios or (pear.negative_floor is not None and not pear.needs_reference)
