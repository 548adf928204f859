"""Report: all that inspect found, and its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pear_megatron.alignment import Alignment
from pear_megatron.config import PearConfig
from pear_megatron.inspect.alternatives import Alternative, alternatives
from pear_megatron.inspect.measure import Pack, Weights, make_pack, weigh
from pear_megatron.inspect.reading import Pick, pick
from pear_megatron.inspect.sample import Sample
from pear_megatron.inspect.verdicts import (
    about_data,
    about_negatives,
    about_policies,
    about_weights,
    about_what_is_not_shown,
    all_is_well,
    is_on_policy,
)
from pear_megatron.pages.page import Verdict, in_order

_QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class Ratios:
    """What a policy's log-probs add.

    Attributes:
        weights: under the given settings.
        alignment: whether both log-probs are about the same tokens.
        alternatives: the given settings and others.
        picks: trajectories to read.
    """

    weights: Weights
    alignment: Alignment
    alternatives: list[Alternative]
    picks: list[Pick]


@dataclass(frozen=True)
class Report:
    """What there is to show.

    Attributes:
        facts: name and value of what was looked at, for the head of the page.
        sample, pack: the trajectories.
        has_behavior: whether the data carry behaviour log-probs at all.
        tokenizer: gives text; None = token ids are shown.
        verdicts: errors first.
        ratios: None where no policy is known.
    """

    facts: list[tuple[str, str]]
    sample: Sample
    pack: Pack
    has_behavior: bool
    tokenizer: Any | None
    verdicts: list[Verdict]
    ratios: Ratios | None

    @property
    def title(self) -> str:
        """The data's names, the first two of them."""
        return ", ".join(self.sample.files[:2]) + (" ..." if len(self.sample.files) > 2 else "")

    def as_json(self) -> dict[str, Any]:
        """What the page says, in numbers."""
        quantiles = {"decisions": _quantiles(self.sample.num_decisions)}
        if self.has_behavior:
            quantiles["behavior_logprobs"] = _quantiles(self.pack.lb)
        result: dict[str, Any] = {
            "facts": dict(self.facts),
            "counts": self.sample.counts,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "quantiles": quantiles,
        }
        if self.ratios is None:
            return result
        weights = self.ratios.weights
        quantiles["log_ratio"] = _quantiles(self.pack.log_ratio)
        quantiles["weight"] = _quantiles(weights.weight)
        quantiles["effective_sample_size"] = _quantiles(weights.effective_sample_size)
        return result | {
            "settings": weights.config.model_dump(mode="json"),
            "statistics": dict(weights.by_sign()),
            "alignment": asdict(self.ratios.alignment),
            "alternatives": [asdict(row) for row in self.ratios.alternatives],
            "trajectories": [
                {"id": self.sample.trajectories[chosen.index].id, "why": chosen.why}
                for chosen in self.ratios.picks
            ],
        }


def make_report(
    sample: Sample,
    policy_logprobs: list[np.ndarray] | None,
    config: PearConfig,
    *,
    policy: str,
    tokenizer: Any | None,
    special_ids: set[int] | None,
) -> Report:
    """Measures and judges a sample.

    Args:
        policy_logprobs: a float32 [n] each, aligned with ``input_ids``; None = no policy is known.
        policy: what the log-probs came from, in words.
        tokenizer, special_ids: give text, if there is one, and say where a response ends.
    """
    pack = make_pack(sample.trajectories, policy_logprobs, config.ratio)
    has_behavior = bool(pack.lb.any())  # without the field they are all 0
    verdicts = list(about_data(sample, _ends(sample, special_ids)))
    ratios = None
    has_reference = pack.reference_logprobs is not None or not config.needs_reference
    if policy_logprobs is None or not has_behavior or not has_reference:
        verdicts.append(_needs(policy_logprobs is not None, has_behavior, has_reference))
    else:
        weights = weigh(pack, config)
        ratios = Ratios(weights, pack.alignment(), alternatives(pack, config), pick(pack, weights))
        found = list(about_policies(pack, ratios.alignment, config))
        if not ratios.alignment.shift:
            on_policy = is_on_policy(pack, config)
            found += about_weights(weights, ratios.alternatives, on_policy=on_policy)
            found += about_negatives(pack, config)
            found += about_what_is_not_shown(config)
        verdicts += found or [all_is_well(weights)]
    return Report(
        facts=_facts(sample, policy, config if ratios is not None else None),
        sample=sample,
        pack=pack,
        has_behavior=has_behavior,
        tokenizer=tokenizer,
        verdicts=in_order(verdicts),
        ratios=ratios,
    )


def _needs(has_policy: bool, has_behavior: bool, has_reference: bool) -> Verdict:
    ways = []
    if not has_behavior:
        ways.append("add behavior_logprobs (`pear-megatron score --model WRITER`)")
    if not has_reference:
        ways.append(
            "add reference_logprobs (`pear-megatron score --as reference`), which these settings need"
        )
    if not has_policy:
        ways.append("name the policy that training starts from (--model DIR, or --scored if the data carry "
                    "policy_logprobs)")  # fmt: skip
    return Verdict(
        "note",
        "no ratios yet",
        "A weight compares the policy that training starts from with the one that wrote the data. This page "
        "shows the data alone.",
        f"To see weights, {' and '.join(ways)}.",
    )


def _facts(sample: Sample, policy: str, config: PearConfig | None) -> list[tuple[str, str]]:
    seen, total = len(sample.trajectories), len(sample.lengths)
    drawn = f"{seen:,}, drawn at random (seed {sample.seed}); all that follows is theirs"
    facts = [
        ("data", ", ".join(sample.files)),
        ("trajectories", f"{total:,} with {int(sample.num_decisions.sum()):,} decisions"),
        ("looked at", "all" if seen == total else drawn),
        ("rewards", _rewards(sample.rewards)),
        ("policy", policy),
    ]
    if config is not None:
        values = config.model_dump(mode="json").items()
        facts.append(("settings", " ".join(f"pear.{key}={value}" for key, value in values)))
    return facts


def _rewards(rewards: np.ndarray) -> str:
    low, high, negative = float(rewards.min()), float(rewards.max()), int((rewards < 0).sum())
    spread = f"{low:g} everywhere" if low == high else f"{low:g} to {high:g}"
    return spread + (f"; {negative:,} negative example{'' if negative == 1 else 's'}" if negative else "")


def _ends(sample: Sample, special_ids: set[int] | None) -> float | None:
    """Share of trajectories whose last decision is a special token."""
    if not special_ids:
        return None
    ends = [int(t.input_ids[np.flatnonzero(t.loss_mask)[-1]]) in special_ids for t in sample.trajectories]
    return sum(ends) / len(ends)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values.astype(np.float64), _QUANTILES)
    return {
        "mean": float(values.mean()),
        **{f"p{q * 100:g}": float(v) for q, v in zip(_QUANTILES, found, strict=True)},
    }
