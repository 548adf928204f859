"""What the numbers mean for training, in words, each with the setting to change."""

from __future__ import annotations

from collections.abc import Iterator

from pear_megatron.alignment import REFERENCE_APART, Alignment
from pear_megatron.config import SUGGESTED_NEGATIVE_FLOOR, PearConfig
from pear_megatron.inspect.alternatives import Alternative, weight_text
from pear_megatron.inspect.measure import Pack, Weights
from pear_megatron.inspect.sample import Sample
from pear_megatron.pages.page import Verdict

_FAR = 2.0  # nats: a token that is 7 times less likely
_UNEVEN = 4.0  # times: the median weight of the first quarter and of the last
_CONTENT = 0.35  # docs/study.md, How to tell beforehand


def about_data(sample: Sample, ends: float | None) -> Iterator[Verdict]:
    """Findings that need no policy; ``ends``: share of responses that end with a special token, None = not known."""
    kept, dropped = sample.counts["trajectories"], sample.counts["dropped_truncated"]
    if dropped:
        share = dropped / (kept + dropped)
        yield Verdict(
            "warning" if share > 0.2 else "note",
            "truncated responses",
            f"{dropped:,} of {kept + dropped:,} rows ({share:.0%}) are marked truncated and left out: a "
            "weight comes from what follows a token, and theirs is missing.",
            "Generate with a larger limit of new tokens, or the data lean towards short answers."
            if share > 0.2
            else "So few bias little; a larger limit of new tokens would keep them.",
        )
    if ends is not None and ends < 0.99:
        yield Verdict(
            "warning",
            "responses that look cut off",
            f"{1 - ends:.0%} of the responses do not end with a special token (an end of turn). If they ran "
            "into a token limit, what their weights should come from is missing.",
            "Mark such rows with truncated=true; let loss_mask include the end-of-turn token.",
        )
    idle = int((sample.rewards == 0).sum())
    if idle:
        yield Verdict(
            "warning",
            "rewards of 0",
            f"{idle:,} of {len(sample.rewards):,} trajectories have reward 0: they train nothing, and their tokens "
            "count in the mean all the same, so that steps are smaller.",
            "Leave them out, or make them negative examples by a reward below zero (pear.negative_floor).",
        )
    half = sample.counts["half_precision"]
    if half:
        yield Verdict(
            "warning",
            "half precision",
            f"The behaviour log-probs of {half:,} of {kept:,} trajectories look rounded to float16 or bfloat16; "
            "the error is as large as the log ratios they go into.",
            "Compute and store them in float32 (`pear-megatron score` does).",
        )
    overlong = sample.counts["dropped_overlong"]
    if overlong:
        yield Verdict(
            "note",
            "over-long trajectories",
            f"{overlong:,} trajectories do not fit into data.seq_length and are left out (data.overlong=drop).",
            "Raise data.seq_length to keep them.",
        )


def is_on_policy(pack: Pack, config: PearConfig) -> bool:
    """Whether the policy itself wrote the data, so that no setting could tell their tokens apart."""
    return config.ratio == "behavior" and float(abs(pack.lp - pack.lb).mean()) < 0.02


def about_policies(pack: Pack, alignment: Alignment, config: PearConfig) -> Iterator[Verdict]:
    """Findings about the two policies' log-probs."""
    raw = pack.lp - pack.lb
    r, mean = alignment.correlations[0], float(raw.mean())
    if alignment.shift:
        yield Verdict(
            "error",
            "misaligned log-probs",
            f"The {alignment.describe()}. Every ratio compares different tokens.",
            "Score the data again (`pear-megatron score`), or move the arrays: behavior_logprobs[i] is the "
            "log-prob of input_ids[i], not of the token after it.",
        )
        return
    if config.needs_reference and pack.lr is not None:
        yield from _about_reference(float(abs(pack.lp - pack.lr).mean()))
    if is_on_policy(pack, config):
        spread = float(abs(raw).mean())
        yield Verdict(
            "note",
            "on-policy data",
            f"The policy gives these tokens the log-probs that their writer gave them (they differ by {spread:.4f} "
            "on average): every ratio is 1 and PEAR weighs by place alone.",
            "Plain SFT (pear.variant=none) does the same with less; PEAR is for data of another policy.",
        )
        if config.variant != "none":
            yield _growth(config)
        return
    certain = float((pack.lb > -0.01).mean())
    if r < 0.1 and alignment.decisions >= 200:
        right_for = "a model with fresh weights only"
        if certain > 0.5:  # a program, or a temperature near 0: what hardly varies correlates with nothing
            right_for = f"a model with fresh weights, or a writer as certain as this one ({certain:.0%} of its tokens)"
        yield Verdict(
            "warning",
            "log-probs that have nothing to do with each other",
            f"The two policies' log-probs correlate by {r:.2f}. That is right for {right_for}; "
            "otherwise one of them was computed over other tokens: another tokenizer, another chat "
            "template, or another row.",
            "Score the data again with the policy's own tokenizer: `pear-megatron score`.",
        )
    elif r > 0.95 and not 0.9 < alignment.spread_ratio < 1.1:
        what = "below" if alignment.spread_ratio > 1 else "above"
        yield Verdict(
            "warning",
            "wrong temperature",
            f"The log-probs go hand in hand (correlation {r:.2f}), but the behaviour policy's spread is "
            f"{alignment.spread_ratio:.2f} times the policy's, as if they were taken at a temperature {what} 1.",
            "Ask the server for log-probs before temperature and top-p are applied, or score the data again.",
        )
    if mean < -0.5:
        yield Verdict(
            "note",
            "the model finds the data unlikely",
            f"It gives each token {abs(mean):.2f} less log-prob than the policy that wrote it (mean log ratio "
            f"{mean:+.2f}).",
            "Take data of a nearer writer or the model's own samples, or train plain SFT on these first and score "
            "again; pear.baseline=sequence_mean weighs by what is unlikely even for this trajectory.",
        )


def about_weights(
    measured: Weights, alternatives: list[Alternative], *, on_policy: bool
) -> Iterator[Verdict]:
    """Findings about the weights under the given settings; of on-policy data it is known that they say little."""
    if measured.config.variant == "none":
        if measured.config.has_factors:
            return
        yield Verdict(
            "note",
            "plain SFT",
            "pear.variant=none: every weight is 1.",
            "For PEAR set pear.variant to token, block or sequence.",
        )
        return
    saturated = list(_saturation(measured, alternatives))
    yield from saturated
    if not saturated and not on_policy:
        yield from _place_and_content(alternatives)
    mean = measured.statistics["weight"]
    if mean > 3 and measured.config.normalize == "none":
        size = weight_text(mean)
        yield Verdict(
            "note",
            "large weights",
            f"The mean weight is {size}, and the gradient about {size} times SFT's. AdamW does not mind a factor, "
            "but optimizer.clip_grad then cuts every step.",
            "Raise optimizer.clip_grad by that factor, or set pear.normalize=sequence.",
        )


def _saturation(measured: Weights, alternatives: list[Alternative]) -> Iterator[Verdict]:
    """Weights and ratios that stand at their bounds."""
    s = measured.statistics
    if s["weight_at_floor"] > 0.2:
        yield Verdict(
            "warning",
            "collapse to the floor",
            f"{s['weight_at_floor']:.0%} of the weights are at their floor: these tokens train nothing."
            + _adds_up(measured.config),
            _better(alternatives, "weight_at_floor", "at the floor"),
        )
    if s["ratio_clipped_low"] > 0.8:
        yield Verdict(
            "warning",
            "weights that see only the place",
            f"{s['ratio_clipped_low']:.0%} of the ratios are at the low clip and count alike, so a weight says how "
            "far a token is from the end, not whether the model can follow what comes.",
            _better(alternatives, "ratio_clipped_low", "at the low clip"),
        )
    if s["weight_at_ceiling"] > 0.05:
        low, high = measured.config.log_ratio_clip
        drift = (
            " The clip is wider above than below, so log weights drift up along a response."
            if high > -low
            else ""
        )
        yield Verdict(
            "warning",
            "weights at their ceiling",
            f"{s['weight_at_ceiling']:.0%} of the weights are at their ceiling, where tokens count alike, as in "
            f"plain SFT.{drift}{_adds_up(measured.config)}",
            _better(alternatives, "weight_at_ceiling", "at the ceiling"),
        )


def _place_and_content(alternatives: list[Alternative]) -> Iterator[Verdict]:
    """Weights that differ by their place in a response, or that hardly differ otherwise."""
    given = alternatives[0]
    if not 1 / _UNEVEN < given.fall < _UNEVEN:
        little = "end" if given.fall > 1 else "beginning"
        yield Verdict(
            "warning",
            "weights that depend on the place",
            f"The median weight is {weight_text(given.first_quarter)} in the first quarter of the responses and "
            f"{weight_text(given.last_quarter)} in the last: their {little} hardly trains, and what stands there "
            "alone, an answer's format say, is hardly learned. It delayed RL in one world of our study.",
            _says_more(alternatives),
        )
    elif given.content < _CONTENT:
        yield Verdict(
            "note",
            "weights that say little",
            f"Their content is {given.content:.2f}: tokens at the same place weigh nearly alike. In our study no "
            "setting of so little brought RL's start forward.",
            _says_more(alternatives),
        )


def _says_more(alternatives: list[Alternative]) -> str:
    """The setting of most content among those that treat all of a response alike."""
    level = [
        setting
        for setting in alternatives[1:]
        if setting.remedy
        and setting.at_bounds <= 5
        and 0.5 <= setting.fall <= 2.0
        and setting.content >= _CONTENT
    ]
    if not level:
        return (
            "No setting of the table has content without a fall. Try a pear.gamma at which the last two columns agree, "
            "a narrower pear.log_ratio_clip, or plain SFT."
        )
    best = max(level, key=lambda setting: setting.content)
    return (
        f"{best.overrides} has a content of {best.content:.2f}, and {weight_text(best.first_quarter)} and "
        f"{weight_text(best.last_quarter)} in the first and last quarter. Compare it with plain SFT before a long run "
        "(docs/study.md)."
    )


def _about_reference(apart: float) -> Iterator[Verdict]:
    """Whether the reference is the model that training starts from; ``apart``: mean difference of their log-probs."""
    if apart > REFERENCE_APART:
        yield Verdict(
            "warning",
            "a reference that is another model",
            f"reference_logprobs differ from this model's log-probs by {apart:.2f} on average. The reference is the "
            "model before training, so that all log ratios start at 0.",
            "Score the data again with the model that training starts from: `pear-megatron score --as reference`.",
        )


def about_negatives(pack: Pack, config: PearConfig) -> Iterator[Verdict]:
    """Findings about trajectories of negative reward, and settings that are about them alone."""
    floor = config.negative_floor
    if not len(pack.fallen):
        idle = [
            f"pear.{name}"
            for name, used in (
                ("negative_floor", floor is not None),
                ("negative_scale", config.negative_scale != 1),
            )
            if used
        ]
        if not idle:
            return
        yield Verdict(
            "note",
            "no negative examples",
            f"No reward here is below zero, so {' and '.join(idle)} "
            f"{'does' if len(idle) == 1 else 'do'} nothing.",
            "Leave it out, or check the reward column.",
        )
        return
    below = float((pack.fallen > (_FAR if floor is None else floor)).mean())
    begin = "the behaviour policy's" if pack.lr is None else "the initial model's"
    if floor is None:
        yield Verdict(
            "note",
            "negatives that nothing stops",
            "Training pushes the tokens of negative examples down for as long as it sees them, and their mass "
            f"moves to tokens that no example speaks for. {below:.0%} of their decisions are more than {_FAR:g} "
            f"nats below {begin} log-probs already.",
            f"Set pear.negative_floor={SUGGESTED_NEGATIVE_FLOOR:g}: in one world of our study negatives "
            "did harm without a floor, and none with this one (docs/weights.md).",
        )
    elif below > 0.5:
        yield Verdict(
            "warning",
            "negatives that have stopped",
            f"{below:.0%} of the decisions of negative examples are more than pear.negative_floor={floor:g} nats "
            f"below {begin} log-probs before training begins: they train nothing.",
            "Raise pear.negative_floor, or take its start from the model itself: `pear-megatron score --as "
            "reference`.",
        )


def about_what_is_not_shown(config: PearConfig) -> Iterator[Verdict]:
    """Settings whose effect log-probs alone do not show."""
    if config.entropy_power:
        yield Verdict(
            "note",
            "entropies are not known here",
            "The weights of this page are those without pear.entropy_power: it needs the policy's whole "
            "distribution, and the page has log-probs.",
            "Watch pear/weight and pear/entropy in the log of a few steps.",
        )


def all_is_well(measured: Weights) -> Verdict:
    """What is said where nothing is wrong."""
    s = measured.statistics
    return Verdict(
        "good",
        "weights that tell tokens apart",
        f"Mean weight {weight_text(s['weight'])}, {s['weight_at_floor']:.0%} at the floor, effective sample size "
        f"{s['effective_sample_size']:.0%} of a trajectory's decisions.",
        "Nothing to change: train with these settings.",
    )


def _growth(config: PearConfig) -> Verdict:
    """What becomes of weights that start at 1 because the policy wrote the data itself."""
    if config.normalize == "sequence":
        effect = "the effective sample size falls (pear.normalize=sequence holds the mean weight at 1)"
        remedy = "Watch pear/effective_sample_size in the log"
    else:
        effect = "the mean weight rises, and the gradient with it"
        remedy = "Watch pear/weight in the log, and set pear.normalize=sequence"
    return Verdict(
        "note",
        "weights that will grow",
        "Weights start near 1 and move as training goes: fitting the data raises the policy's log-probs above the "
        f"recorded ones, ratios pass 1, products of them run away, and {effect}.",
        f"{remedy}; lower optimizer.lr or train fewer epochs if it runs away. docs/weights.md shows how weights move.",
    )


def _adds_up(config: PearConfig) -> str:
    """Why a sequence weight saturates."""
    if config.variant != "sequence" or config.sequence_scale == "mean":
        return ""
    return " A sum over a response grows with its length; a mean does not (pear.sequence_scale=mean)."


def _better(alternatives: list[Alternative], statistic: str, words: str) -> str:
    """The alternative that halves a share without driving the weights to either bound."""
    given = alternatives[0]
    helpful = [
        setting
        for setting in alternatives[1:]
        if setting.remedy
        and setting.statistics[statistic] <= given.statistics[statistic] / 2
        and setting.at_bounds <= max(20, given.at_bounds // 2)
    ]
    if not helpful:
        return (
            "No setting of the table helps. Take data that the model finds likelier (a nearer writer, its own "
            "samples) or shorter responses, or narrow pear.log_ratio_clip further."
        )
    best = min(helpful, key=lambda setting: (setting.at_bounds, -setting.statistics["effective_sample_size"]))
    s = best.statistics
    return (
        f"{best.overrides} would leave {s[statistic]:.0%} {words} and {best.at_bounds}% at either bound, with a mean "
        f"weight of {weight_text(s['weight'])}."
    )
