"""Trajectories as text, each token shaded by its weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    ranked = np.lexsort((pack.means(pack.log_ratio), pack.means(measured.weight)))
    order = [int(i) for i in ranked if pack.num_decisions[i]]
    best = order[::-1][:_BEST]
    worst = [i for i in order[:_WORST] if i not in best]
    return [Pick(i, "counts most") for i in best] + [Pick(i, "counts least") for i in worst]


@dataclass(frozen=True)
class Piece:
    """Some text of a trajectory: a token, or tokens that share a character.

    Attributes:
        text: as it is, with line breaks that can be pointed at.
        level: its shade, see ``shade``; None = no decision.
        tip: the numbers of its decisions.
    """

    text: str
    level: int | None = None
    tip: str = ""


@dataclass(frozen=True)
class Reading:
    """One trajectory, to be read.

    Attributes:
        why, id, negative: its heading, and whether it is a negative example.
        facts: a few words each.
        prompt: the end of what comes before the first decision.
        prompt_tokens, prompt_left_out: tokens of all of that, and of those that ``prompt`` lacks.
        stretches: tokens left out before, and the pieces that follow: of a long response beginning and end.
    """

    why: str
    id: str
    negative: bool
    facts: tuple[str, ...]
    prompt: str
    prompt_tokens: int
    prompt_left_out: int
    stretches: list[tuple[int, list[Piece]]]


def read(
    chosen: Pick, trajectory: Trajectory, pack: Pack, measured: Weights, tokenizer: Any | None
) -> Reading:
    """A trajectory as text: its prompt, and every decision with its numbers."""
    mine = slice(*np.searchsorted(pack.segment, [chosen.index, chosen.index + 1]))
    ids, mask = trajectory.input_ids, trajectory.loss_mask
    first, place = int(np.argmax(mask)), np.cumsum(mask) - 1 + mine.start
    stretches = [range(first, len(ids))]
    if len(ids) - first > _SHOWN:
        stretches = [range(first, first + _SHOWN // 2), range(len(ids) - _SHOWN // 2, len(ids))]
    done, found = first, []
    for stretch in stretches:
        texts = [
            _piece(
                text,
                [int(place[stretch.start + i]) for i in members if mask[stretch.start + i]],
                pack,
                measured,
            )
            for text, members in pieces(ids[stretch.start : stretch.stop], tokenizer)
        ]
        found.append((stretch.start - done, texts))
        done = stretch.stop
    return Reading(
        why=chosen.why,
        id=trajectory.id,
        negative=trajectory.reward < 0,
        facts=(
            f"reward {trajectory.reward:g}",
            f"{pack.num_decisions[chosen.index]:,} decisions",
            f"mean weight {measured.weight[mine].mean():.3g}",
            f"effective sample size {measured.effective_sample_size[chosen.index]:.0%}",
            f"mean log ratio {pack.log_ratio[mine].mean():+.3f}",
        ),
        prompt=_visible("".join(text for text, _ in pieces(ids[:first][-_PROMPT:], tokenizer))),
        prompt_tokens=first,
        prompt_left_out=max(first - _PROMPT, 0),
        stretches=found,
    )


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
        return min(_SHADES + 1 + int(log_weight), _SHADES + 3)
    depth = min(-config_floor, math.log(1e4))  # what is 10000 times lighter than SFT's looks alike
    return max(0, round(_SHADES * (1 + log_weight / depth)))


def _piece(text: str, decisions: list[int], pack: Pack, measured: Weights) -> Piece:
    if not decisions:
        return Piece(_visible(text))
    tip = " | ".join(
        f"weight {measured.weight[d]:.3g}, lp {pack.lp[d]:.3f}, lb {pack.lb[d]:.3f}, "
        f"ratio {math.exp(min(float(pack.log_ratio[d]), 80.0)):.3g}"
        for d in decisions
    )
    level = shade(float(measured.weight[decisions[-1]]), measured.config.log_weight_clip[0])
    return Piece(_visible(text), level, tip)


def _visible(text: str) -> str:
    """With line breaks that can be pointed at."""
    return text.replace("\n", "\N{RETURN SYMBOL}\n")
