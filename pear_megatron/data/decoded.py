"""A trajectory as text, its decisions marked, for a person to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pear_megatron.data.trajectory import Trajectory

_SHOWN = 800  # tokens of a trajectory, at most


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens that are all decisions, or all none.

    Attributes:
        text: as the tokenizer decodes them, special tokens included.
        decisions: whether the policy chose them.
        left_out: how many tokens stand here that are not shown; ``text`` is then empty.
    """

    text: str
    decisions: bool
    left_out: int = 0


def stretches(trajectory: Trajectory, tokenizer: Any) -> Iterator[Stretch]:
    """The trajectory from its beginning to its end; of a long one the middle is left out."""
    n, half = len(trajectory.input_ids), _SHOWN // 2
    if n <= _SHOWN:
        yield from _decoded(trajectory, 0, n, tokenizer)
        return
    yield from _decoded(trajectory, 0, half, tokenizer)
    yield Stretch("", False, n - _SHOWN)
    yield from _decoded(trajectory, n - half, n, tokenizer)


def in_brackets(trajectory: Trajectory, tokenizer: Any) -> str:
    """The trajectory as plain text, decisions between [[ and ]]."""
    parts = []
    for stretch in stretches(trajectory, tokenizer):
        if stretch.left_out:
            parts.append(left_out_text(stretch.left_out))
        else:
            parts.append(f"[[{stretch.text}]]" if stretch.decisions else stretch.text)
    return "".join(parts)


def left_out_text(count: int) -> str:
    """What stands where tokens are not shown."""
    return f"\n... {count:,} tokens left out ...\n"


def _decoded(trajectory: Trajectory, start: int, end: int, tokenizer: Any) -> Iterator[Stretch]:
    ids = np.asarray(trajectory.input_ids[start:end]).tolist()
    mask = np.asarray(trajectory.loss_mask[start:end])
    bounds = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1).tolist(), len(ids)]
    before = ""
    for first, last in pairwise(bounds):
        # Some tokenizers decode a token otherwise at the start of a text than in its middle.
        text = tokenizer.decode(ids[:last], skip_special_tokens=False)
        own = text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[first:last])
        yield Stretch(own, bool(mask[first]))
        before = text
