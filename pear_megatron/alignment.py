"""Whether behaviour log-probs belong to the tokens they stand at, or to the ones a little before or after.

``alignment_sums`` turns log-probs into a few sums that may be added over micro-batches and ranks;
``read_alignment`` turns the sums into correlations and a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pear_megatron.ops.suffix_sum import as_cu_seqlens

ACCUSED = (-2, -1, 1, 2)  # the shifts that off-by-one mistakes make
FURTHEST = 8  # shifts up to here show how large a correlation the data give by themselves
_SHIFTS = tuple(range(-FURTHEST, FURTHEST + 1))
_SUMS = 6
MIN_PAIRS = 200  # of decisions: a shift is told from no fewer
REFERENCE_APART = 0.1  # nats on average: more than rounding and another kernel make
# (correlation, margin over every other shift, standard errors of the gain over shift 0): one is enough.
_CONCLUSIVE = ((0.65, 0.45, 6.0), (0.95, 0.1, 3.0))


@dataclass(frozen=True)
class Alignment:
    """How well behaviour log-probs fit the policy's, at each shift (see ``read_alignment``).

    Attributes:
        decisions: how many were compared.
        correlations: shift s -> correlation of decision t's policy log-prob with decision t+s's behaviour
            log-prob; 0 where there is nothing to correlate.
        shift: 0, or the shift at which they conclusively belong together; 1 means that the data carry each
            log-prob one decision later than its own.
        spread_ratio: standard deviation of the behaviour log-probs over that of the policy's, at the shift
            found; 0 if either does not vary.
    """

    decisions: int
    correlations: dict[int, float]
    shift: int
    spread_ratio: float

    def describe(self, name: str = "behavior_logprobs") -> str:
        """One sentence on a shift that was found; the empty string if there is none."""
        if not self.shift:
            return ""
        count, side = abs(self.shift), "after" if self.shift > 0 else "before"
        tokens = "1 token" if count == 1 else f"{count} tokens"
        return (
            f"{name} seem to stand {tokens} {side} the ones they belong to: over {self.decisions} "
            f"decisions they correlate with the model's own log-probs by {self.correlations[0]:.2f} as they "
            f"stand and by {self.correlations[self.shift]:.2f} when moved by {-self.shift:+d}"
        )

    def refusal(self, name: str = "behavior_logprobs", way_out: str = "train.check_alignment=false") -> str:
        """What is wrong with data that are shifted, and the way out; ``way_out`` is the setting that lets them pass."""
        return (
            f"the {self.describe(name)}, so every ratio would compare different tokens; {name}[i] is the "
            "log-prob of input_ids[i] itself: write them again with `pear-megatron score`, or set "
            f"{way_out} if you are sure of them"
        )


def alignment_sums(logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What ``read_alignment`` needs of some trajectories, float64 [17, 6]; add it over batches and ranks.

    Args:
        logprobs: [T] floating, the policy's; anything off the mask.
        behavior_logprobs: [T] floating, as they stand in the data.
        mask: [T] bool, True on decisions.
        cu_seqlens: [segments + 1] integer, boundaries of the trajectories.
    """
    cu = as_cu_seqlens(cu_seqlens, logprobs.device).long()
    segments = torch.arange(cu.numel() - 1, device=cu.device)
    segment = segments.repeat_interleave(cu.diff(), output_size=mask.numel())[mask]  # [decisions]
    x = _centred(logprobs.detach()[mask].double(), segment, segments.numel())
    y = _centred(behavior_logprobs.detach()[mask].double(), segment, segments.numel())
    return torch.stack([_pair_sums(x, y, segment, shift) for shift in _SHIFTS])


def no_sums(device: torch.device) -> Tensor:
    """The sums of no trajectories, to add to."""
    return torch.zeros((len(_SHIFTS), _SUMS), dtype=torch.float64, device=device)


def _centred(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Minus each trajectory's mean: a hard trajectory next to an easy one is no evidence about places."""
    sums = values.new_zeros((2, segments))
    sums[0].index_add_(0, segment, values)
    sums[1].index_add_(0, segment, torch.ones_like(values))
    return values - (sums[0] / sums[1].clamp(min=1))[segment]


def _pair_sums(x: Tensor, y: Tensor, segment: Tensor, shift: int) -> Tensor:
    """[6]: sums over the t for which t and t + shift are decisions of one trajectory."""
    pairs = max(x.numel() - abs(shift), 0)
    t = torch.arange(pairs, device=x.device) + max(-shift, 0)
    t = t[segment[t] == segment[t + shift]]
    own, here, there = x[t], y[t], y[t + shift]
    gain = own * (there - here)
    sums = (own * own, there * there, own * there, gain, gain * gain)
    return torch.stack([own.new_tensor(float(t.numel())), *(value.sum() for value in sums)])


def read_alignment(sums: Tensor) -> Alignment:
    """Correlations at every shift, and a shift other than 0 only where the evidence is conclusive.

    A shift of 1 or 2 either way is accused if it correlates by 0.65 and by 0.45 more than every other shift
    from -8 to 8 (repetitive text alone lifts several shifts at once), or by 0.95 and 0.1 (nearly the same
    model on very repetitive text), over 200 pairs or more, and if its gain over shift 0 is beyond chance.

    The bounds come from SmolLM2-135M on its own answers, prose, code, JSON, sums, sorting and digits (350 to
    2880 decisions each), with its log-probs exact, at temperature 0.7 and 1.3, of a copy with noise in its
    weights (0.1 to 0.5 less log-prob a token) and of one without its last two layers (0.5 to 6 less). Aligned, the best
    wrong shift led every other by at most 0.23, with a correlation of 0.3, for policies from these to models
    without a third of their layers and with fresh weights, in 10 500 samples of 2 to 16 rows; none was
    accused. Nor was one of 7 500 policies that are random functions of the last one to three tokens; the
    nearest led by 0.35 with 0.58, on sorting. Shifted by 1 or 2, the same models led by 0.49 to 0.91 with
    0.69 to 1, except on digits (0.16 to 0.2, found by the second bound if the models are alike) and on
    answers of seven tokens, which are too few to tell. A policy that has little to do with the writer
    (a correlation below 0.65) is never accused: shifted data pass there.
    """
    pairs, xx, yy, xy, gain, gain_squared = sums.double().cpu().unbind(1)  # [17] each
    scale = (xx * yy).sqrt()
    r = torch.where(scale > 0, xy / scale.clamp(min=1e-300), 0.0)
    sigmas = gain / gain_squared.sqrt().clamp(min=1e-300)
    best = max((_SHIFTS.index(shift) for shift in ACCUSED), key=lambda i: float(r[i]))
    comparable = pairs >= pairs[best] / 2  # short trajectories leave the far shifts too few
    comparable[best] = False
    margin = r[best] - r[comparable].max() if comparable.any() else 0.0
    conclusive = pairs[best] >= MIN_PAIRS and any(
        r[best] >= least and margin >= lead and sigmas[best] >= errors for least, lead, errors in _CONCLUSIVE
    )
    found = best if conclusive else FURTHEST
    return Alignment(
        decisions=int(pairs[FURTHEST]),
        correlations=dict(zip(_SHIFTS, r.tolist(), strict=True)),
        shift=_SHIFTS[found],
        spread_ratio=float((yy[found] / xx[found]).sqrt()) if xx[found] > 0 else 0.0,
    )
