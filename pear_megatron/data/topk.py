"""TopK: the behaviour policy's likeliest tokens at each decision, and how rows give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pear_megatron.data.columns import TOPK_IDS, TOPK_LOGPROBS
from pear_megatron.data.errors import RowProblem
from pear_megatron.data.fields import get_ragged, vocabulary

MAX_ENTRIES = 128  # of a decision: what the loss takes
_POSITIVE_TOLERANCE = 1e-5  # what rounding leaves of log 1
_MASS_TOLERANCE = 1e-4
_WAY_OUT = "score the row again with `pear-megatron score --top-k`"


@dataclass(frozen=True, eq=False)
class TopK:
    """Entries of d decisions, end to end; their order within a decision means nothing.

    Attributes:
        counts: integer [d], entries of each decision, at least 1.
        ids: int32 [counts.sum()], token ids, different within a decision.
        logprobs: float32 [counts.sum()], log-probs at temperature 1, normalised over the whole vocabulary.
        width: the largest count of any decision of the data set.
    """

    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    width: int

    @classmethod
    def of_padded(cls, ids: np.ndarray, logprobs: np.ndarray) -> TopK:
        """From [d, k] arrays; an id below 0 is no entry."""
        real = ids >= 0
        counts = real.sum(axis=1)
        width = int(counts.max(initial=0))
        return cls(counts, ids[real].astype(np.int32), logprobs[real].astype(np.float32), width)

    def padded(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(int32 [d, width], float32 [d, width]), -1 and -inf where there is no entry."""
        ids = np.full((len(self.counts), width), -1, dtype=np.int32)
        logprobs = np.full(ids.shape, -np.inf, dtype=np.float32)
        real = np.arange(width) < np.asarray(self.counts)[:, None]
        ids[real], logprobs[real] = self.ids, self.logprobs
        return ids, logprobs

    def select(self, keep: np.ndarray) -> TopK:
        """The decisions where ``keep``, bool [d], is True."""
        entries = np.repeat(keep, self.counts)
        return TopK(self.counts[keep], self.ids[entries], self.logprobs[entries], self.width)


def read_behavior_topk(
    fields: Mapping[str, Any],
    input_ids: np.ndarray,
    mask: np.ndarray,
    behavior: np.ndarray | None,
    source: str,
    *,
    vocab_size: int | None,
) -> TopK:
    """The row's entries on its decisions; what stands elsewhere is left out.

    Args:
        fields: the row, which has both fields.
        input_ids: integer [n].
        mask: bool [n], the decisions.
        behavior: float32 [n], behavior_logprobs, to compare the sampled tokens' entries with; None = there are none.
        source: what the n tokens came from, for the message.
        vocab_size: of the model; None = not known.

    Raises:
        RowProblem: lists of different lengths; a decision without entries, with more than MAX_ENTRIES, with an id
            twice or outside the vocabulary, without the sampled token or with another log-prob for it; log-probs
            that are not finite, positive, or add up to more than 1.
    """
    ids, logprobs = get_ragged(fields, TOPK_IDS, int), get_ragged(fields, TOPK_LOGPROBS, float)
    for name, lists in ((TOPK_IDS, ids), (TOPK_LOGPROBS, logprobs)):
        if len(lists.lengths) != len(mask):
            raise RowProblem(
                f"{name} has {len(lists.lengths)} entries and {source} {len(mask)}; entry i belongs to token i of the "
                f"whole trajectory, prompt included (null or empty there); {_WAY_OUT}"
            )
    unlike = np.flatnonzero((ids.lengths != logprobs.lengths) & mask)
    if len(unlike):
        i = unlike[0]
        raise RowProblem(
            f"{TOPK_IDS}[{i}] has {ids.lengths[i]} entries and {TOPK_LOGPROBS}[{i}] {logprobs.lengths[i]}; give a "
            f"log-prob for every id, or {_WAY_OUT}"
        )
    entries = _Entries(np.flatnonzero(mask), ids.of(mask), logprobs.of(mask), ids.lengths[mask])
    entries.check_ids(vocab_size)
    entries.check_logprobs()
    entries.check_sampled(input_ids, behavior)
    kept = np.minimum(entries.logprobs, 0.0).astype(np.float32)
    return TopK(entries.counts, entries.ids.astype(np.int32), kept, int(entries.counts.max()))


class _Entries:
    """The entries of a row's decisions, end to end.

    Args:
        positions: int64 [d], where the decisions stand among the tokens.
        ids, logprobs: int64 and float64 [counts.sum()].
        counts: int64 [d].
    """

    def __init__(
        self, positions: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, counts: np.ndarray
    ) -> None:
        self.ids, self.logprobs, self.counts = ids, logprobs, counts
        self._positions = positions
        for wrong, said in (
            (counts == 0, "is empty on a decision"),
            (counts > MAX_ENTRIES, f"has more than {MAX_ENTRIES} entries, the most that the loss takes"),
        ):
            if wrong.any():
                raise RowProblem(f"{TOPK_IDS}[{positions[wrong.argmax()]}] {said}; {_WAY_OUT}")
        self._starts = np.cumsum(counts) - counts
        self._decision = np.repeat(np.arange(len(counts)), counts)  # of each entry

    def check_ids(self, vocab_size: int | None) -> None:
        """Ids are in the vocabulary, and different within a decision."""
        size = np.iinfo(np.int32).max if vocab_size is None else vocab_size
        wrong = np.flatnonzero((self.ids < 0) | (self.ids >= size))
        if len(wrong):
            raise RowProblem(
                f"{self._name(TOPK_IDS, wrong[0])} = {self.ids[wrong[0]]} is {vocabulary(vocab_size)}; leave padding "
                f"out, or {_WAY_OUT}"
            )
        keys = np.sort((self._decision << 32) | self.ids)
        twice = np.flatnonzero(keys[1:] == keys[:-1])
        if len(twice):
            d, token_id = divmod(int(keys[twice[0]]), 1 << 32)
            raise RowProblem(
                f"{TOPK_IDS}[{self._positions[d]}] has the id {token_id} twice: its mass would count twice; {_WAY_OUT}"
            )

    def check_logprobs(self) -> None:
        """Log-probs are finite, not positive, and those of a decision add up to 1 at most."""
        for wrong, what, way_out in (
            (~np.isfinite(self.logprobs), "not finite", "leave out tokens without probability"),
            (self.logprobs > _POSITIVE_TOLERANCE, "positive", "store log p (not p, not -log p)"),
        ):
            if wrong.any():
                j = int(wrong.argmax())
                raise RowProblem(
                    f"{self._name(TOPK_LOGPROBS, j)} = {self.logprobs[j]:g} is {what}; {way_out}"
                )
        mass = np.add.reduceat(np.exp(self.logprobs), self._starts)
        if (mass > 1 + _MASS_TOLERANCE).any():
            d = int(mass.argmax())
            raise RowProblem(
                f"{TOPK_LOGPROBS}[{self._positions[d]}] has probabilities that add up to {mass[d]:.6g}; log-probs "
                f"must be normalised over the whole vocabulary, at temperature 1; {_WAY_OUT}"
            )

    def check_sampled(self, input_ids: np.ndarray, behavior: np.ndarray | None) -> None:
        """The token that was sampled is among the entries, with its behavior_logprobs."""
        sampled = np.flatnonzero(self.ids == input_ids[self._positions][self._decision])
        found = np.zeros(len(self.counts), dtype=bool)
        found[self._decision[sampled]] = True
        if not found.all():
            i = self._positions[found.argmin()]
            raise RowProblem(
                f"{TOPK_IDS}[{i}] does not have the sampled token input_ids[{i}] = {input_ids[i]}: entries are "
                "shifted or of other tokens, or it was left out of the top k; add it with its log-prob, or "
                f"{_WAY_OUT}"
            )
        if behavior is None:
            return
        expected, given = behavior[self._positions].astype(np.float64), self.logprobs[sampled]
        wrong = ~np.isclose(given, expected, rtol=1e-6, atol=_POSITIVE_TOLERANCE)
        if wrong.any():
            d = int(wrong.argmax())
            i = self._positions[d]
            raise RowProblem(
                f"behavior_logprobs[{i}] = {expected[d]:g}, but the sampled token's entry in {TOPK_LOGPROBS}[{i}] is "
                f"{given[d]:g}: they are of different models or contexts, or one of them is shifted; {_WAY_OUT}"
            )

    def _name(self, column: str, entry: int) -> str:
        d = self._decision[entry]
        return f"{column}[{self._positions[d]}][{entry - self._starts[d]}]"
