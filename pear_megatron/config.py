"""PearConfig: which weights PEAR puts on the tokens of an offline trajectory."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pear_megatron.schema import StrictModel

# exp() of more than this is inf in float32; weights are clipped before exp, so it bounds the clip.
_MAX_LOG_WEIGHT = 80.0
# Nats; with this floor negatives did no harm, without one they did (docs/weights.md, Negatives that stop).
SUGGESTED_NEGATIVE_FLOOR = 0.5


class PearConfig(StrictModel):
    """How the SFT loss is reweighted (docs/method.md, Weights and Loss; the settings of arXiv 2602.01058, section 4.2).

    Attributes:
        variant: ``token`` weighs decision t by the ratios of the decisions after it, ``block`` shares
            one weight within each block of decisions, ``own`` weighs it by its own ratio, ``sequence`` gives the whole
            trajectory one weight, ``none`` weighs all alike: plain SFT, unless settings below make it another loss.
        gamma: discount per decision, in (0, 1]; used by ``token`` and ``block``.
        block_size: decisions in a block, >= 1; used by ``block`` alone.
        log_ratio_clip: bounds (lo, hi) of each log ratio, ``lp - lb`` (see ratio).
        log_weight_clip: bounds (lo, hi) of each log weight, applied before ``exp``.
        baseline: ``sequence_mean`` subtracts the trajectory's mean log ratio before clipping.
        normalize: ``sequence`` divides the weights by their mean over the trajectory's decisions.
        control: ``shuffled`` puts the weights of a micro-batch's decisions on other decisions of it, at random:
            the control experiment that keeps how the weights are distributed and takes away what they mean.
            ``shuffled_by_place`` does so among decisions that are as far from the end of their responses, and keeps how
            weights fall with the place too; a micro-batch then needs many responses. Factors (DFT, entropy, negatives
            that have stopped) stay on their own decisions.
        negative_scale: factor on the reward of trajectories whose reward is below zero, >= 0.
        negative_floor: a decision of such a trajectory weighs 0 once its log-prob has fallen more than this below the
            reference's (or the behaviour policy's, where there is no reference), > 0; None = never.
        ratio: whose log-probs the log ratios are taken against: ``behavior``, or ``reference``, the initial model's.
        sequence_scale: with ``variant: sequence``, the log weight is the ``sum`` of the log ratios, or ``tau`` times
            their ``mean``, which length cannot saturate.
        tau: see sequence_scale, > 0.
        base_loss: what the weights multiply: ``nll``, or ``kl``, which is ``(1 - kl_weight) * NLL + kl_weight * KL``
            with the KL of the behaviour policy's stored top-k from the target policy.
        kl_weight: in (0, 1]; used by ``base_loss: kl`` alone.
        kl_tail: what becomes of the mass outside the top-k: ``none`` renormalises the behaviour policy over the
            top-k, ``bucket`` compares the rest as one more token.
        dft_power, dft_floor: the weight is multiplied by ``max(p, dft_floor) ** dft_power``, with the token's
            probability p; 0 = not. Power 1 is DFT. With ``base_loss: kl`` it multiplies the NLL's part alone (ASFT).
        dft_policy: whose probability p is: the ``target`` policy's, or with ``reference`` the initial model's, which
            training does not move (PriFT).
        entropy_power: the weight is multiplied by ``min(H / ln 20, 1) ** entropy_power``, with the entropy H of the
            target policy at the token; 0 = not. Power 1 is EAFT.
        report_entropy: report the mean entropy of the target policy on decisions, as ``pear/entropy``.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) on an unknown key or a bad value.
    """

    variant: Literal["token", "block", "own", "sequence", "none"] = "token"
    gamma: float = Field(default=0.999, gt=0.0, le=1.0)
    block_size: int = Field(default=4, ge=1)
    log_ratio_clip: tuple[float, float] = (-0.08, 0.3)
    log_weight_clip: tuple[float, float] = (-10.0, 5.0)
    baseline: Literal["none", "sequence_mean"] = "none"
    normalize: Literal["none", "sequence"] = "none"
    negative_scale: float = Field(default=1.0, ge=0.0)
    control: Literal["none", "shuffled", "shuffled_by_place"] = "none"
    negative_floor: float | None = Field(default=None, gt=0.0)
    ratio: Literal["behavior", "reference"] = "behavior"
    sequence_scale: Literal["sum", "mean"] = "sum"
    tau: float = Field(default=1.0, gt=0.0)
    base_loss: Literal["nll", "kl"] = "nll"
    kl_weight: float = Field(default=1.0, gt=0.0, le=1.0)
    kl_tail: Literal["none", "bucket"] = "none"
    dft_power: float = Field(default=0.0, ge=0.0)
    dft_floor: float = Field(default=0.0, ge=0.0, le=1.0)
    dft_policy: Literal["target", "reference"] = "target"
    entropy_power: float = Field(default=0.0, ge=0.0)
    report_entropy: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("log_ratio_clip", "log_weight_clip"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name} must be (low, high) with low < high, got ({low}, {high})")
        low, high = self.log_ratio_clip
        if not low <= 0 <= high:
            raise ValueError(
                f"log_ratio_clip ({low:g}, {high:g}) does not contain 0, the logarithm of a ratio of 1: bounds are "
                "logarithms (a ratio of 0.92 is -0.083), and the lower one is below 0"
            )
        if self.log_weight_clip[0] < -_MAX_LOG_WEIGHT:
            raise ValueError(
                f"log_weight_clip: the lower bound {self.log_weight_clip[0]} underflows float32 after exp; "
                f"use at least {-_MAX_LOG_WEIGHT:g} (the default is -10)"
            )
        if self.log_weight_clip[1] > _MAX_LOG_WEIGHT:
            raise ValueError(
                f"log_weight_clip: the upper bound {self.log_weight_clip[1]} overflows float32 after exp; "
                f"use at most {_MAX_LOG_WEIGHT:g} (the default is 5)"
            )
        if self.variant == "sequence" and self.normalize == "sequence":
            raise ValueError(
                "normalize='sequence' divides by the trajectory's mean weight, which with variant='sequence' "
                "makes every weight 1; use normalize='none', or variant='token' or 'block'"
            )
        if self.variant == "none" and self.control != "none":
            raise ValueError(
                f"control={self.control!r} moves weights around, and with variant='none' all of them are 1; "
                "choose another variant, or control='none'"
            )
        for key, value, unused, needs in (
            ("sequence_scale", self.sequence_scale, "sum", ("variant", self.variant, "sequence")),
            ("tau", self.tau, 1.0, ("sequence_scale", self.sequence_scale, "mean")),
            ("kl_weight", self.kl_weight, 1.0, ("base_loss", self.base_loss, "kl")),
            ("kl_tail", self.kl_tail, "none", ("base_loss", self.base_loss, "kl")),
        ):
            name, is_now, wanted = needs
            if value != unused and is_now != wanted:
                raise ValueError(
                    f"{key}={value!r} is used with {name}={wanted!r} alone, and {name} is {is_now!r}; set it, or leave "
                    f"{key} out"
                )
        for key, value in (("dft_floor", self.dft_floor), ("dft_policy", self.dft_policy != "target")):
            if value and not self.dft_power:
                raise ValueError(
                    f"{key} is used with dft_power alone, which is 0; set it, or leave {key} out"
                )
        if self.dft_power and self.base_loss == "kl" and self.kl_weight == 1.0:
            raise ValueError(
                "dft_power is of the NLL, and base_loss='kl' with kl_weight=1 has none; set kl_weight below 1, or "
                "dft_power to 0"
            )
        if self.ratio == "reference" and self.variant == "none":
            raise ValueError(
                "ratio='reference' is used by weights that are made of ratios, and with variant='none' all of them are "
                "1; choose another variant, or leave ratio out (for DFT by the reference's probability, PriFT: "
                "dft_policy='reference')"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs the log-probs of the initial model."""
        return self.ratio == "reference" or self.dft_policy == "reference"

    @property
    def has_factors(self) -> bool:
        """Whether a weight may be multiplied by something beyond its importance (docs/method.md, Factors)."""
        of_dft = self.dft_power > 0 and self.base_loss == "nll"  # with a KL it belongs to the NLL
        return of_dft or self.entropy_power > 0 or self.negative_floor is not None

    @property
    def needs_entropy(self) -> bool:
        """Whether the forward pass takes the entropy of the target policy."""
        return self.report_entropy or self.entropy_power > 0
