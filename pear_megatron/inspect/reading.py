"""Trajectories as text, each token shaded by its weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from pear_megatron.data.trajectory import Trajectory
from pear_megatron.inspect.measure import Pack, Weights

_SHOWN = 1200  # tokens of a response, at most
_PROMPT = 400  # and of a prompt
_BEST, _WORST = 3, 3
_SHADES = 10
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Pick:
    """A trajectory that is worth reading.

    Attributes:
        index: its place in the sample.
        why: the heading.
    """

    index: int
    why: str


def pick(pack: Pack, measured: Weights) -> list[Pick]:
    """The trajectories that count most and least per decision; equal ones by their mean log ratio."""
    count = np.maximum(pack.num_decisions, 1)
    mean = np.bincount(pack.segment, measured.weight.astype(np.float64), minlength=len(count)) / count
    ratio = np.bincount(pack.segment, pack.log_ratio.astype(np.float64), minlength=len(count)) / count
    order = [int(i) for i in np.lexsort((ratio, mean)) if pack.num_decisions[i]]
    best = order[::-1][:_BEST]
    worst = [i for i in order[:_WORST] if i not in best]
    return [Pick(i, "counts most") for i in best] + [Pick(i, "counts least") for i in worst]


def trajectory_html(
    chosen: Pick, trajectory: Trajectory, pack: Pack, measured: Weights, tokenizer: Any | None
) -> str:
    """One trajectory: what it is, its prompt, and every decision with its numbers in a tooltip."""
    mine = slice(*np.searchsorted(pack.segment, [chosen.index, chosen.index + 1]))
    mean = float(measured.weight[mine].mean())
    facts = (
        f"reward {trajectory.reward:g}",
        f"{pack.num_decisions[chosen.index]:,} decisions",
        f"mean weight {mean:.3g}",
        f"effective sample size {measured.effective_sample_size[chosen.index]:.0%}",
        f"mean log ratio {pack.log_ratio[mine].mean():+.3f}",
    )
    sign = " negative" if trajectory.reward < 0 else ""
    first = int(np.argmax(trajectory.loss_mask))
    response = "".join(_response(trajectory, first, mine.start, pack, measured, tokenizer))
    return (
        f'<article class="trajectory{sign}"><h3>{escape(chosen.why)}: <code>{escape(trajectory.id)}</code></h3>'
        f'<p class="facts">{" · ".join(facts)}</p>{_prompt(trajectory.input_ids[:first], tokenizer)}'
        f'<div class="text">{response}</div></article>'
    )


def _prompt(ids: np.ndarray, tokenizer: Any | None) -> str:
    """What comes before the first decision, folded; of a long prompt the end."""
    text = "".join(text for text, _ in pieces(ids[-_PROMPT:], tokenizer))
    left_out = max(len(ids) - _PROMPT, 0)
    gap = f'<span class="gap">{left_out:,} tokens left out</span>' if left_out else ""
    return (
        f"<details><summary>prompt, {len(ids):,} tokens</summary>"
        f'<div class="text">{gap}<i>{_visible(text)}</i></div></details>'
    )


def _response(
    trajectory: Trajectory,
    first: int,
    start: int,
    pack: Pack,
    measured: Weights,
    tokenizer: Any | None,
) -> Iterator[str]:
    """The tokens from the first decision on; of many the beginning and the end.

    Args:
        trajectory: whose tokens they are.
        first: its first decision among its tokens.
        start: the place of that in the flat arrays.
        pack, measured: the flat arrays.
        tokenizer: gives text, if there is one.
    """
    ids, mask = trajectory.input_ids, trajectory.loss_mask
    place = np.cumsum(mask) - 1 + start
    stretches = [range(first, len(ids))]
    if len(ids) - first > _SHOWN:
        stretches = [range(first, first + _SHOWN // 2), range(len(ids) - _SHOWN // 2, len(ids))]
    for stretch in stretches:
        if stretch.start > first:
            yield f'<span class="gap">{stretch.start - stretches[0].stop:,} tokens left out</span>'
        for text, members in pieces(ids[stretch.start : stretch.stop], tokenizer):
            tokens = [stretch.start + i for i in members]
            decisions = [int(place[i]) for i in tokens if mask[i]]
            if decisions:
                yield _decision(text, decisions, pack, measured)
            else:
                yield f"<i>{_visible(text)}</i>"


def pieces(ids: Sequence[int] | np.ndarray, tokenizer: Any | None) -> Iterator[tuple[str, list[int]]]:
    """(text, indices of its tokens), in order; tokens that share a character come together.

    Without a tokenizer each token's text is its id.
    """
    numbers = [int(i) for i in ids]
    if tokenizer is None:
        yield from ((f"{number} ", [i]) for i, number in enumerate(numbers))
        return
    before, begin = 0, 0  # tokens before ``begin`` are out; decoding from ``before`` keeps their spacing
    for end in range(1, len(numbers) + 1):
        context = tokenizer.decode(numbers[before:begin], skip_special_tokens=False)
        text = tokenizer.decode(numbers[before:end], skip_special_tokens=False)
        unfinished = text.endswith(_UNFINISHED) and end - begin < 8
        if unfinished and end < len(numbers):
            continue
        yield text[len(context) :], list(range(begin, end))
        before, begin = begin, end


def shade(weight: float, config_floor: float) -> int:
    """0 (at the floor) to 10 (weight 1) in equal steps of the log weight; 11 to 13 above 1."""
    log_weight = math.log(max(weight, 1e-300))
    if log_weight > 0.01:
        return min(_SHADES + 1 + int(log_weight / 1.0), _SHADES + 3)
    depth = min(-config_floor, math.log(1e4))  # what is 10000 times lighter than SFT's looks alike
    return max(0, round(_SHADES * (1 + log_weight / depth)))


def _decision(text: str, decisions: list[int], pack: Pack, measured: Weights) -> str:
    tip = " | ".join(
        f"weight {measured.weight[d]:.3g}, lp {pack.lp[d]:.3f}, lb {pack.lb[d]:.3f}, "
        f"ratio {math.exp(min(float(pack.log_ratio[d]), 80.0)):.3g}"
        for d in decisions
    )
    level = shade(float(measured.weight[decisions[-1]]), measured.config.log_weight_clip[0])
    return f'<b class="w{level}" title="{tip}">{_visible(text)}</b>'


def _visible(text: str) -> str:
    """Escaped, with line breaks that can be pointed at."""
    return escape(text, quote=False).replace("\n", "\N{RETURN SYMBOL}\n")
